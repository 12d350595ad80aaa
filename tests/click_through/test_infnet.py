"""INFNet: attention and gates, invariants of blocks and network, costs, reference numbers."""

import math

import pytest
import torch
from torch import nn

from shuffle_nb.click_through.infnet import (
    PAIRS,
    CrossAttention,
    INFBlock,
    INFNet,
    INFState,
    ProxyGatedUnit,
    block_as_written,
    cross_attention,
    masked_softmax,
    multitask_bce,
)
from shuffle_nb.foundations.costs import count_flops, count_parameters
from shuffle_nb.foundations.reference import load_reference

CARDS, ITEMS = (3, 5, 4), 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(**options):
    torch.manual_seed(1)
    options = {"dim": 4, "cat_proxies": 2, "emb_std": 1.0} | options
    return INFNet(CARDS, ITEMS, 2, **options).double()


def rows(count=7, steps=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.stack([torch.randint(0, card, (count,), generator=generator) for card in CARDS], 1)
    return x, torch.randint(0, ITEMS + 1, (count, 2, steps), generator=generator)


def state(batch=2, fields=3, steps=5, tasks=2, dim=4, proxies=(2, 2, 2)):
    sizes = (fields, steps, tasks, *proxies)
    return INFState(*(normal(batch, n, dim, seed=i) for i, n in enumerate(sizes)))


# ---------------------------------------------------------------- attention


def test_the_folded_form_is_the_formula():
    attention = CrossAttention(4).double()
    q, kv, mask = normal(3, 2, 4), normal(3, 5, 4, seed=1), torch.rand(3, 5) < 0.5
    matrices = (layer.weight.T for layer in attention.children())
    assert torch.allclose(attention(q, kv, mask), cross_attention(q, kv, *matrices, mask))


def test_weights_sum_to_one_and_order_does_not_matter():
    attention = CrossAttention(4).double()
    q, kv = normal(3, 3, 4), normal(3, 5, 4, seed=1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    out, weights = attention(q, kv, mask, need_weights=True)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 3).double())
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(attention(q, kv[:, order], mask[:, order]), out)
    assert torch.allclose(attention(q[:, [2, 0, 1]], kv, mask), out[:, [2, 0, 1]])


def test_no_question_is_the_mean_of_the_valid_values():
    attention = CrossAttention(4).double()
    nn.init.zeros_(attention.query.weight)
    kv, mask = normal(1, 3, 4), torch.tensor([[True, False, True]])
    values = attention.value(kv)
    assert torch.allclose(attention(normal(1, 2, 4), kv, mask), values[:, [0, 2]].mean(1, True))


def test_padding_has_no_effect_and_no_gradient():
    attention = CrossAttention(4).double()
    q, kv = normal(2, 2, 4).requires_grad_(), normal(2, 3, 4).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = attention(q, kv, mask)
    out.square().sum().backward()
    assert (out[1] == 0).all() and out[0].abs().min() > 0
    assert (kv.grad[~mask] == 0).all() and kv.grad[mask].abs().min() > 0
    assert q.grad.isfinite().all() and (q.grad[1] == 0).all()
    other = torch.where(mask[..., None], kv, 9.0)
    assert torch.equal(attention(q, other, mask), out)
    assert attention(q, kv[:, :0], mask[:, :0]).abs().sum() == 0


def test_masked_softmax_without_a_mask_is_softmax():
    scores = normal(2, 3, 4)
    assert torch.equal(masked_softmax(scores), scores.softmax(-1))
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(masked_softmax(scores, mask), scores.softmax(-1))


# ---------------------------------------------------------------- gate


def test_the_gate_is_the_same_for_all_tokens():
    unit = ProxyGatedUnit(4, 2).double()
    x, proxies = normal(3, 6, 4), normal(3, 2, 4, seed=1)
    gate = unit.gate(proxies)
    assert gate.min() > 0 and gate.max() < 1 and gate.shape == (3, 4)
    assert torch.allclose(unit(x, proxies), x + x * gate[:, None])
    assert torch.equal(unit(x[:, :1], proxies), unit(x, proxies)[:, :1])
    assert unit(x[:, :0], proxies).shape == (3, 0, 4)
    literal = ProxyGatedUnit(4, 2, gate_residual=False).double()
    assert (literal(x, proxies).abs() <= x.abs()).all()


@pytest.mark.parametrize(("gate_residual", "factor"), [(True, 1.5), (False, 0.5)])
def test_a_last_layer_of_zero_opens_the_gate_half(gate_residual, factor):
    unit = ProxyGatedUnit(4, 2, hidden=7, gate_residual=gate_residual)
    nn.init.zeros_(unit.layers[-1].weight)
    nn.init.zeros_(unit.layers[-1].bias)
    x = torch.randn(2, 3, 4)
    assert torch.allclose(unit(x, torch.randn(2, 2, 4)), factor * x)
    assert unit.layers[0].out_features == 7


# ---------------------------------------------------------------- block


def test_three_passes_are_eight_attentions():
    block, given = INFBlock(4, 2, 2, 2).double(), state()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    for ours, plain in zip(block(given, mask), block_as_written(block, given, mask), strict=True):
        assert torch.allclose(ours, plain, atol=1e-12)


def test_the_last_block_computes_the_same_tasks():
    block, given = INFBlock(4, 2, 2, 2).double(), state()
    after, short = block(given), block(given, last=True)
    assert torch.allclose(after.T, short.T) and torch.allclose(after.T_proxy, short.T_proxy)
    assert short.S is given.S and short.C is given.C and short.C_proxy is given.C_proxy
    _, weights = block(given, need_weights=True)
    assert tuple(sorted(weights)) == tuple(sorted(PAIRS))
    assert weights["cs"].shape == (2, 2, 5) and weights["tc"].shape == (2, 2, 3)


def test_switches_of_the_block():
    given = state()
    nothing = INFBlock(4, 2, 2, 2, use_gate=False, use_cross=False)(given)
    assert all(torch.equal(new, old) for new, old in zip(nothing, given, strict=True))
    gates = INFBlock(4, 2, 2, 2, use_cross=False).double()
    after = gates(given)
    assert torch.equal(after.C, gates.gates["C"](given.C, given.C_proxy))
    assert torch.equal(after.T, gates.gates["T"](given.T, given.T_proxy))
    bare = INFBlock(4, 2, 2, 2, use_gate=False).double()
    assert torch.equal(bare(given).C, given.C) and not torch.equal(bare(given).T, given.T)
    quiet = INFBlock(4, 2, 2, 2, use_task=False).double()
    after, weights = quiet(given, need_weights=True)
    assert set(weights) == {"cs", "sc"} and torch.equal(after.T, given.T)
    early = INFBlock(4, 2, 2, 2, gate_from="previous").double()
    assert torch.equal(early(given).S, early.gates["S"](given.S, given.S_proxy))
    literal = INFBlock(4, 2, 2, 2, residual=False).double()
    full = INFBlock(4, 2, 2, 2).double()
    full.load_state_dict(literal.state_dict())
    assert torch.allclose(full(given).C_proxy, given.C_proxy + literal(given).C_proxy)


def test_gradients_of_a_block():
    block, given = INFBlock(4, 2, 2, 2).double(), state(steps=3)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    inputs = tuple(tensor.requires_grad_() for tensor in given)
    assert torch.autograd.gradcheck(lambda *s: block(INFState(*s), mask)[:3], inputs)


# ---------------------------------------------------------------- costs


def multiply_adds(steps, run, dim=32):
    block = INFBlock(dim, 4, 2, 2)
    sizes = (16, steps, 2, 4, 2, 2)
    given = INFState(*(torch.zeros(2, n, dim) for n in sizes))
    return count_flops(run(block), given) // 2


def written(dim, queries, keys):
    return queries * dim**2 + 2 * keys * dim**2 + 2 * queries * keys * dim


def test_multiply_adds_are_linear_in_the_history():
    plain = [multiply_adds(L, lambda b: lambda s: block_as_written(b, s)) for L in (64, 128, 192)]
    ours = [multiply_adds(L, lambda b: b) for L in (64, 128, 192)]
    for counts, a_step in ((plain, 6 * 32**2 + 2 * 32 * 8), (ours, 2 * 32 * 8)):
        assert counts[2] - 2 * counts[1] + counts[0] == 0
        assert counts[1] - counts[0] == 2 * 64 * a_step
    asks, answers = {"c": 4, "s": 2, "p": 2, "t": 2}, {"c": 16, "s": 64, "t": 2}
    cross = sum(written(32, asks[who], answers[whom]) for who, whom in PAIRS)
    gates = sum(n * 32**2 + 32**2 for n in (4, 2, 2))
    assert plain[0] == 2 * (cross + gates)


def test_parameters_by_formula():
    d, proxies = 16, (2, 2, 2)
    count = 24 * d**2 + sum(p * d**2 + d + d**2 + d for p in proxies)
    assert count_parameters(INFBlock(d, *proxies)).trainable == count


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"seq_tables": "shared"}, 26_082),
        ({"seq_tables": "shared", "use_task": False}, 29_154),
        ({"seq_tables": "shared", "use_gate": False}, 21_282),
        ({"seq_tables": "shared", "use_cross": False}, 13_794),
        ({}, 26_466),
        ({"num_blocks": 1}, 17_922),
    ],
)
def test_parameters_of_the_network(options, count):
    model = INFNet((10, 24, 10, 10), 24, 2, cat_proxies=2, **options)
    assert count_parameters(model).trainable == count


# ---------------------------------------------------------------- network


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_task": False},
        {"use_gate": False},
        {"residual": False, "gate_from": "previous", "gate_residual": False},
        {"seq_proxies": 3},
        {"seq_proxies": 1, "use_task": False},
        {"num_blocks": 3, "num_tasks": 3, "head_hidden": (), "task_proxies": 1},
    ],
)
def test_rows_are_independent_and_padding_changes_nothing(options):
    model, (x, seq) = net(**options), rows()
    logits = model(x, seq)
    assert logits.shape == (7, options.get("num_tasks", 2))
    assert torch.allclose(model(x[3:4], seq[3:4]), logits[3:4])
    padded = torch.cat([torch.zeros_like(seq[..., :2]), seq], dim=2)
    assert torch.allclose(model(x, padded), logits, atol=1e-9)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(model(x, seq[..., order]), logits, atol=1e-9)
    assert not torch.allclose(model(x, seq.flip(1)), logits, atol=1e-3)
    assert model(x[:0], seq[:0]).shape == (0, logits.shape[1])
    strided = torch.stack([seq, seq], -1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(model(x, strided), logits)


def test_a_shared_table_cannot_tell_behaviours_apart_in_attention():
    model, (x, seq) = net(seq_tables="shared"), rows()
    seq[:, 1] = seq[:, 0]
    _, attention = model(x, seq, return_attention=True)
    first, second = attention[0]["ts"].chunk(2, dim=2)
    assert torch.allclose(first, second)
    _, attention = net()(x, seq, return_attention=True)
    first, second = attention[0]["ts"].chunk(2, dim=2)
    assert not torch.allclose(first, second, atol=1e-2)


def test_attention_does_not_change_the_logits():
    model, (x, seq) = net(), rows()
    logits, attention = model(x, seq, return_attention=True)
    assert torch.allclose(logits, model(x, seq), atol=1e-12)
    assert len(attention) == 2 and all(set(block) == set(PAIRS) for block in attention)
    some = (seq > 0).flatten(1).any(1)
    assert torch.allclose(attention[1]["ts"].sum(-1)[some], torch.ones(1).double())
    assert (attention[0]["cs"][(seq == 0).flatten(1)[:, None].expand(-1, 2, -1)] == 0).all()


def test_a_broken_vector_spoils_its_own_rows_only():
    model, (x, seq) = net(), rows()
    with torch.no_grad():
        model.fields.embedding.weight[0] = math.nan
    broken = model(x, seq).isnan().any(1)
    assert torch.equal(broken, x[:, 0] == 0) and broken.any() and not broken.all()


def test_without_attention_all_rows_are_alike():
    model, (x, seq) = net(use_cross=False), rows()
    logits = model(x, seq)
    assert (logits - logits[:1]).abs().max() < 1e-12


@pytest.mark.parametrize(("blocks", "mixed"), [(1, False), (2, True)])
def test_without_gates_target_and_history_meet_in_the_second_block_only(blocks, mixed):
    """A mixed second difference of T in a field and an item is zero after one block."""
    model = net(use_gate=False, num_blocks=blocks)
    x, seq = torch.tensor([[0, 0, 0]]), torch.tensor([[[1, 2], [3, 0]]])
    other_x, other_seq = torch.tensor([[0, 4, 0]]), torch.tensor([[[5, 2], [3, 0]]])

    def tasks(x, seq):
        current, valid = model.start(x, seq)
        for block in model.blocks:
            current = block(current, valid)
        return current.T

    change = tasks(x, seq) - tasks(other_x, seq) - tasks(x, other_seq) + tasks(other_x, other_seq)
    assert (change.abs().max() > 1e-4) == mixed


def test_a_task_does_not_move_the_head_of_another():
    model, (x, seq) = net(), rows()
    y = torch.rand(7, 2).round()
    multitask_bce(model(x, seq), y, [1.0, 0.0]).backward()
    assert all((p.grad == 0).all() for p in model.heads[1].parameters())
    assert model.fields.embedding.weight.grad.abs().sum() > 0
    assert (model.items.weight.grad[0] == 0).all()


def test_loss_is_a_sum_over_tasks():
    logits, y = normal(5, 2), torch.rand(5, 2).round()
    each = [
        nn.functional.binary_cross_entropy_with_logits(logits[:, t], y[:, t].double())
        for t in (0, 1)
    ]
    assert torch.allclose(multitask_bce(logits, y), each[0] + each[1])
    assert torch.allclose(multitask_bce(logits, y, [2, 0.5]), 2 * each[0] + each[1] / 2)
    assert multitask_bce(torch.full((1, 1), math.nan), torch.ones(1, 1)).isnan()


@pytest.mark.parametrize("items", [0, 1, 24])
@pytest.mark.parametrize("types", [1, 2])
def test_rows_without_a_history(items, types):
    model = INFNet(CARDS, items, types, num_tasks=1, dim=4)
    x, _ = rows()
    seq = torch.zeros(7, types, 1, dtype=torch.long)
    logits = model(x, seq)
    assert logits.isfinite().all() and logits.std() > 0
    multitask_bce(logits, torch.ones(7, 1)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in gradients)
    assert model.fields.embedding.weight.grad.abs().sum() > 0
    assert torch.allclose(model(x, seq[..., :0]), logits, atol=1e-6)
    assert count_flops(model, x, seq) > 0


@pytest.mark.parametrize("options", [{}, {"use_task": False}, {"seq_proxies": 3}])
def test_one_graph_autocast_and_single(options, plain_python):
    model, (x, seq) = net(**options).float(), rows()
    seq[0] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = model(x, seq)
    assert torch.allclose(compiled(x, seq), logits, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(x, seq).float(), logits, atol=0.3)
    half = model.to(torch.bfloat16)
    assert half(x, seq).dtype == torch.bfloat16 and half(x, seq).isfinite().all()


def test_it_learns_which_sequence_belongs_to_which_task():
    torch.manual_seed(0)
    model = INFNet((2,), 2, 2, dim=8, cat_proxies=1, task_proxies=1)
    x, seq = torch.zeros(256, 1, dtype=torch.long), torch.randint(1, 3, (256, 2, 1))
    y = (seq[..., 0] == 1).float()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        loss = multitask_bce(model(x, seq), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ---------------------------------------------------------------- reference numbers


def put(parameter, values):
    with torch.no_grad():
        parameter.copy_(values)


def attention_from(attention, tensors, start="W_", flip="QKV"):
    for layer, letter in zip(attention.children(), flip, strict=True):
        put(layer.weight, tensors[start + letter].T)


def layers_from(layers, tensors, start=""):
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(linear, 1):
        put(layer.weight, tensors[f"{start}W{i}"].T)
        put(layer.bias, tensors[f"{start}b{i}"])


def block_from(block, tensors, number):
    for pair, attention in block.attention.items():
        attention_from(attention, tensors, f"{number}.{pair}.")
    for kind, gate in block.gates.items():
        layers_from(gate.layers, tensors, f"{number}.gate{kind}.")


def of_attention(case):
    tensors, attention = case.tensors, CrossAttention(4).double()
    attention_from(attention, tensors)
    q, kv = tensors["q"].requires_grad_(), tensors["kv"].requires_grad_()
    out, weights = attention(q, kv, tensors["mask"].bool(), need_weights=True)
    out.square().sum().backward()
    slopes = {"q": q.grad, "kv": kv.grad}
    slopes |= {"W_Q": attention.query.weight.grad.T, "W_V": attention.value.weight.grad.T}
    found = {f"gradient of sum(output**2) w.r.t. {name}": slope for name, slope in slopes.items()}
    return found | {"output": out, "weights": weights}


def of_gate(case):
    tensors, literal = case.tensors, ProxyGatedUnit(3, 2, gate_residual=False).double()
    layers_from(literal.layers, tensors)
    residual = ProxyGatedUnit(3, 2).double()
    residual.load_state_dict(literal.state_dict())
    x, proxies = tensors["x"].requires_grad_(), tensors["proxies"].requires_grad_()
    out = literal(x, proxies)
    out.square().sum().backward()
    slopes = {"x": x.grad, "proxies": proxies.grad, "W1": literal.layers[0].weight.grad.T}
    found = {f"gradient of sum((x * gate)**2) w.r.t. {k}": slope for k, slope in slopes.items()}
    found |= {"gate": literal.gate(proxies), "x * gate": out}
    return found | {"x + x * gate": residual(x, proxies)}


def of_block(case):
    tensors, found = case.tensors, {}
    given = INFState(*(tensors[name].requires_grad_() for name in INFState._fields))
    literal = {"residual": False, "gate_from": "previous", "gate_residual": False}
    for form, options in (("literal", literal), ("default", {})):
        block = INFBlock(3, 2, 2, 1, **options).double()
        block_from(block, tensors, 0)
        after = block(given, tensors["mask"].bool())
        found |= {f"{name}, {form}": new for name, new in zip(after._fields, after, strict=True)}
    sum(tensor.square().sum() for tensor in after[:3]).backward()
    slopes = {name: tensor.grad for name, tensor in zip(given._fields, given, strict=True)}
    slopes["0.ts.K"] = block.attention["ts"].key.weight.grad.T
    slopes["0.gateT.W1"] = block.gates["T"].layers[0].weight.grad.T
    start = "gradient of sum(C**2) + sum(S**2) + sum(T**2), default form, w.r.t. "
    return found | {start + name: slope for name, slope in slopes.items()}


def of_network(case):
    options, tensors = dict(case.settings), case.tensors
    options.pop("what")
    weights = options.pop("task_weights")
    model = INFNet(**options).double()
    put(model.fields.embedding.weight, tensors["E"])
    put(model.items.weight, tensors["E_seq"])
    put(model.tasks, tensors["T"])
    put(model.task_proxies, tensors["T_proxy"])
    layers_from(model.to_cat_proxies, tensors, "cat.")
    put(model.to_seq_proxies.weight, tensors["seq.W"].T)
    put(model.to_seq_proxies.bias, tensors["seq.b"])
    for number, block in enumerate(model.blocks):
        block_from(block, tensors, number)
    for number, head in enumerate(model.heads):
        layers_from(head, tensors, f"head{number}.")
    logits = model(tensors["x"].long(), tensors["seq"].long())
    loss = multitask_bce(logits, tensors["y"].double(), weights)
    loss.backward()
    slopes = {
        "E": model.fields.embedding.weight.grad,
        "E_seq": model.items.weight.grad,
        "T": model.tasks.grad,
        "T_proxy": model.task_proxies.grad,
        "cat.W2": model.to_cat_proxies[-1].weight.grad.T,
        "seq.W": model.to_seq_proxies.weight.grad.T,
        "0.cs.V": model.blocks[0].attention["cs"].value.weight.grad.T,
        "1.tc.Q": model.blocks[1].attention["tc"].query.weight.grad.T,
        "head1.W1": model.heads[1][0].weight.grad.T,
    }
    found = {f"gradient of the loss w.r.t. {name}": slope for name, slope in slopes.items()}
    return found | {"logits": logits, "loss": loss.reshape(1)}


RUNS = {"ca": of_attention, "pgu": of_gate, "block": of_block, "net": of_network}


@pytest.mark.parametrize("case", list(load_reference("infnet")), ids=lambda case: case.name)
def test_against_the_loops(case, agree):
    agree(case, RUNS[case.settings["what"]](case))


# ---------------------------------------------------------------- bad input


X, SEQ = torch.tensor([[0, 1, 2]]), torch.tensor([[[1, 2], [3, 0]]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CrossAttention(0), "dim must be at least 1, got 0"),
        (
            lambda: CrossAttention(4)(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)),
            r"q must be \(batch, n, 4\)",
        ),
        (
            lambda: CrossAttention(4)(torch.zeros(1, 2, 4), torch.zeros(2, 2, 4)),
            r"kv must be \(1, s, 4\)",
        ),
        (
            lambda: CrossAttention(4)(
                torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.ones(1, 3).bool()
            ),
            r"mask must be \(1, 2\), got shape \(1, 3\)",
        ),
        (
            lambda: CrossAttention(4)(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.ones(1, 2)),
            "mask must be True where a token is valid, got torch.float32",
        ),
        (lambda: ProxyGatedUnit(4, 0), "num_proxies must be at least 1"),
        (
            lambda: ProxyGatedUnit(4, 2)(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)),
            r"proxies must be \(batch, 2, 4\)",
        ),
        (lambda: INFBlock(4, 2, 2, 2, gate_from="later"), "gate_from must be one of"),
        (
            lambda: INFBlock(4, 2, 2, 2).double()(state(), torch.ones(2, 4).bool()),
            r"seq_mask must be \(2, 5\)",
        ),
        (lambda: INFNet(CARDS, ITEMS, 2, num_tasks=0), "num_tasks must be at least 1, got 0"),
        (lambda: INFNet(CARDS, -1, 2), "seq_vocab must be in 0"),
        (lambda: INFNet(CARDS, ITEMS, 2, seq_proxies=0), "seq_proxies must be at least 1"),
        (lambda: INFNet(CARDS, ITEMS, 2, seq_tables="both"), "seq_tables must be one of"),
        (lambda: INFNet(CARDS, ITEMS, 2, emb_std=0.0), "emb_std must be positive"),
        (lambda: INFNet(CARDS, ITEMS, 2)(X + 3, SEQ), r"field 0: id 3 out of range \[0, 3\)"),
        (lambda: INFNet(CARDS, ITEMS, 2)(X, SEQ + 5), r"seq must be in 0\.\.6, got 5 to 8"),
        (
            lambda: INFNet(CARDS, ITEMS, 2)(X, SEQ[:, :1]),
            r"seq must be \(1, 2, n\), got shape \(1, 1, 2\)",
        ),
        (lambda: INFNet(CARDS, ITEMS, 2)(X, SEQ.float()), "seq must be whole numbers"),
        (lambda: INFNet(CARDS, ITEMS, 2)(X[:, :2], SEQ), r"x must be \(batch, 3\)"),
        (
            lambda: multitask_bce(torch.zeros(3, 2), torch.zeros(3, 1)),
            r"y must be \(3, 2\) as logits",
        ),
        (
            lambda: multitask_bce(torch.zeros(3, 2), torch.zeros(3, 2), [1.0]),
            "weights must hold 2 numbers, got 1",
        ),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
