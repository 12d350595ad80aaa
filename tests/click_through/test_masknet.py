"""MaskNet: the authors' numbers, the card's invariants, shapes and types, bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.click_through.masknet import (
    FieldLayerNorm,
    InstanceGuidedMask,
    MaskBlock,
    MaskNet,
    ParallelMaskNet,
    SerialMaskNet,
)
from shuffle_nb.foundations.costs import peak_memory
from shuffle_nb.foundations.reference import load_reference

NETS = {"serial": SerialMaskNet, "parallel": ParallelMaskNet}
CARDS = (5, 7, 3)
sizes = st.integers(1, 6)


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in double precision, its every number random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.7)
    return module.double()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def by_formula(block: MaskBlock, v_emb, v_in):
    """One block, written with other operations."""
    first, second = block.mask.aggregate, block.mask.project
    mask = torch.clamp(v_emb @ first.weight.T + first.bias, min=0) @ second.weight.T + second.bias
    v = (mask * v_in) @ block.linear.weight.T
    v = v - v.mean(1, keepdim=True)
    v = v / (v.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return torch.clamp(v * block.norm.weight + block.norm.bias, min=0)


# --- the mask and the block


@given(emb=sizes, z=sizes, q=sizes, batch=st.integers(0, 4), ratio=st.floats(1.0, 4.0))
@settings(max_examples=30, deadline=None)
def test_a_block_is_its_formula(emb, z, q, batch, ratio):
    block = stirred(MaskBlock(emb, z, q, ratio))
    v_emb, v_in = torch.randn(batch, emb).double(), torch.randn(batch, z).double()
    torch.testing.assert_close(block(v_emb, v_in), by_formula(block, v_emb, v_in))


def test_masks_have_no_bounds():
    mask = stirred(InstanceGuidedMask(4, 6))
    values = mask(100 * torch.randn(50, 4).double())
    assert values.min() < -10 and values.max() > 10


@pytest.mark.parametrize(
    ("ratio", "z", "width"), [(0.2, 390, 78), (0.2, 400, 80), (0.29, 100, 29), (1.5, 7, 10)]
)
def test_the_middle_of_a_mask_has_int_r_z_units(ratio, z, width):
    assert InstanceGuidedMask(3, z, ratio).aggregate.out_features == width
    assert InstanceGuidedMask(3, z).aggregate.out_features == 2 * z


def test_a_mask_of_ones_is_no_mask():
    masked, plain = stirred(MaskBlock(4, 5, 6)), stirred(MaskBlock(4, 5, 6, mask=False))
    for part in ("linear", "norm"):
        getattr(plain, part).load_state_dict(getattr(masked, part).state_dict())
    nn.init.zeros_(masked.mask.project.weight), nn.init.ones_(masked.mask.project.bias)
    v_emb, v_in = torch.randn(7, 4).double(), torch.randn(7, 5).double()
    assert torch.equal(masked(v_emb, v_in), plain(v_emb, v_in))
    expected = masked.norm(masked.linear(v_in)).relu()
    torch.testing.assert_close(masked(v_emb, v_in), expected)


def test_a_mask_of_zeros_gives_every_row_the_bias_of_the_norm():
    block = stirred(MaskBlock(4, 5, 6))
    nn.init.zeros_(block.mask.project.weight), nn.init.zeros_(block.mask.project.bias)
    out = block(torch.randn(7, 4).double(), torch.randn(7, 5).double())
    torch.testing.assert_close(out, block.norm.bias.relu().expand(7, 6))


@pytest.mark.parametrize("c", [0.2, 3.0, -2.0])
def test_only_the_direction_of_a_mask_counts_before_the_norm(c):
    block = stirred(MaskBlock(12, 12, 7, activation=False))
    block.norm.eps = 1e-12
    v_emb, v_in = torch.randn(9, 12).double(), torch.randn(9, 12).double()
    before = (block(v_emb, v_in) - block.norm.bias) / block.norm.weight
    with torch.no_grad():
        for parameter in block.mask.project.parameters():
            parameter.mul_(c)
    after = (block(v_emb, v_in) - block.norm.bias) / block.norm.weight
    torch.testing.assert_close(after, before if c > 0 else -before, atol=1e-6, rtol=1e-6)


def test_one_block_holds_a_dot_product_exactly():
    block = MaskBlock(6, 6, 1, 1.0, layer_norm=False, mask_activation="identity", activation=False)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        block.mask.aggregate.weight[:3, 3:] = torch.eye(3)
        block.mask.project.weight.copy_(torch.eye(6))
        block.linear.weight[:, :3] = 1
    e = torch.randn(20, 2, 3)
    dot = (e[:, 0] * e[:, 1]).sum(1, keepdim=True)
    torch.testing.assert_close(block(e.flatten(1), e.flatten(1)), dot)


def test_a_block_without_activations_is_a_low_rank_cross_layer():
    block = stirred(
        MaskBlock(6, 6, 4, 0.5, layer_norm=False, mask_activation="identity", activation=False)
    )
    v = torch.randn(9, 6).double()
    first, second = block.mask.aggregate, block.mask.project
    low_rank = second.weight @ first.weight
    assert torch.linalg.matrix_rank(low_rank) == 3
    bias = second.weight @ first.bias + second.bias
    torch.testing.assert_close(block(v, v), ((v @ low_rank.T + bias) * v) @ block.linear.weight.T)


def test_how_mask_and_input_meet_can_be_exchanged():
    block = stirred(MaskBlock(4, 4, 3, layer_norm=False))
    v = torch.randn(5, 4).double()
    block.combine = torch.add
    expected = block.linear(block.mask(v) + v).relu()
    torch.testing.assert_close(block(v, v), expected)
    assert MaskBlock.combine is torch.mul


def test_ablations_leave_out_what_they_name():
    bare = MaskBlock(4, 5, 6, mask=False, layer_norm=False)
    assert [name for name, _ in bare.named_parameters()] == ["linear.weight"]
    v_emb, v_in = torch.randn(3, 4), torch.randn(3, 5)
    assert bare(v_emb, v_in, return_mask=True)[1] is None
    only_mask = MaskBlock(4, 5, 6, ffn=False)
    out, mask = only_mask(v_emb, v_in, return_mask=True)
    assert only_mask.out_dim == 5 and torch.equal(out, mask * v_in)
    with_bias = MaskBlock(4, 5, 6, bias=True)
    assert with_bias.linear.bias is not None and MaskBlock(4, 5, 6).linear.bias is None


# --- the norm of each field


@given(batch=st.integers(0, 4), fields=sizes, k=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_norm_is_one_layer_norm_a_field(batch, fields, k):
    norm = stirred(FieldLayerNorm(fields, k))
    single = [nn.LayerNorm(k).double() for _ in range(fields)]
    for i, layer in enumerate(single):
        layer.load_state_dict({"weight": norm.weight[i], "bias": norm.bias[i]})
    emb = torch.randn(batch, fields, k).double()
    expected = torch.stack([layer(emb[:, i]) for i, layer in enumerate(single)], dim=1)
    torch.testing.assert_close(norm(emb), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(emb), expected)


def test_each_field_has_mean_zero_and_variance_one():
    emb = 30 * torch.randn(50, 4, 10) + 7
    normed = FieldLayerNorm(4, 10)(emb)
    torch.testing.assert_close(normed.mean(2), torch.zeros(50, 4), atol=1e-5, rtol=0)
    variance = normed.var(2, unbiased=False)
    torch.testing.assert_close(variance, torch.ones(50, 4), atol=1e-4, rtol=0)


def test_inputs_are_never_changed():
    for build in NETS.values():
        net, emb = build(3, 4, hidden=(5,)), torch.randn(6, 3, 4)
        before = emb.clone()
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                net(emb)
            assert torch.equal(emb, before)
    block = MaskBlock(4, 4, 4, ffn=False)
    v = torch.randn(3, 4)
    before = v.clone()
    block(v, v)
    assert torch.equal(v, before)


# --- the networks


def test_every_mask_reads_the_raw_embeddings():
    for build in NETS.values():
        net = stirred(build(3, 4, hidden=(5, 6)))
        emb = torch.randn(7, 3, 4).double()
        _, masks = net(emb, return_masks=True)
        for block, mask in zip(net.blocks, masks, strict=True):
            torch.testing.assert_close(mask, block.mask(emb.flatten(1)))
    serial = stirred(SerialMaskNet(3, 4, hidden=(5, 6)))
    assert [mask.shape[1] for mask in serial(emb, return_masks=True)[1]] == [12, 5]


def test_parallel_blocks_are_single_blocks_side_by_side():
    net = stirred(ParallelMaskNet(3, 4, num_blocks=3, block_dim=5, hidden=(6,)))
    emb = torch.randn(7, 3, 4).double()
    v_emb, v_in = emb.flatten(1), net.emb_norm(emb).flatten(1)
    outs = [by_formula(block, v_emb, v_in) for block in net.blocks]
    torch.testing.assert_close(net(emb), net.head(torch.cat(outs, dim=1)))


def test_the_order_of_parallel_blocks_permutes_columns_of_the_next_layer():
    net = stirred(ParallelMaskNet(3, 4, num_blocks=3, block_dim=5, hidden=(6,)))
    emb = torch.randn(7, 3, 4).double()
    before = net(emb)
    net.blocks = nn.ModuleList([net.blocks[i] for i in (2, 0, 1)])
    columns = net.head[0].weight.detach().unflatten(1, (3, 5))[:, [2, 0, 1]].flatten(1)
    net.head[0].weight = nn.Parameter(columns)
    torch.testing.assert_close(net(emb), before)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    "options", [{"mask": False}, {"emb_layernorm": False}, {"hid_layernorm": False}, {"ffn": False}]
)
def test_ablated_networks_run(kind, options):
    net = NETS[kind](3, 4, hidden=(5, 6), **options)
    out, masks = net(torch.randn(7, 3, 4), return_masks=True)
    assert out.shape == (7, 1)
    assert len(masks) == len(net.blocks)
    widths = {block.linear.out_features for block in net.blocks if block.linear is not None}
    if options == {"ffn": False}:
        assert not widths and all(mask.shape == (7, 12) for mask in masks)
    if options == {"mask": False}:
        assert masks == [None] * len(masks)


def test_parameter_counts_of_the_open_benchmark():
    frappe = ParallelMaskNet(10, 10, 3, 50, (400, 400, 400), 2.0, emb_layernorm=False)
    criteo = SerialMaskNet(39, 10, (400, 400, 400), 0.2, emb_layernorm=False)
    assert (count(frappe), count(criteo)) == (517_801, 667_469)
    m, z, q, t = 12, 5, 7, 10
    assert count(MaskBlock(m, z, q)) == t * m + t + z * t + z + q * z + 2 * q
    with_norm = SerialMaskNet(39, 10, (400, 400, 400), 0.2)
    assert count(with_norm) - count(criteo) == 2 * 39 * 10


def test_first_weights():
    torch.manual_seed(0)
    net = SerialMaskNet(8, 16, hidden=(256,), bias=True)
    spread = (2 / (128 + 256)) ** 0.5
    assert abs(net.blocks[0].mask.aggregate.weight.std().item() / spread - 1) < 0.05
    assert all(not p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    net = SerialMaskNet(8, 16, hidden=(256,), init="torch")
    assert net.blocks[0].mask.aggregate.weight.abs().max() <= 128**-0.5
    assert net.head.bias.any()


@pytest.mark.parametrize("kind", NETS)
def test_from_ids_to_logits(kind):
    model = MaskNet(CARDS, 4, kind, hidden=(6,))
    x = torch.stack([torch.randint(card, (9,)) for card in CARDS], dim=1)
    logits, masks = model(x, return_masks=True)
    assert logits.shape == (9,) and masks[0].shape == (9, 12)
    assert torch.equal(logits, model(x))
    assert torch.equal(logits, model.net(model.embed(x))[:, 0])
    assert model(x[:0]).shape == (0,) and model(x[:1]).shape == (1,)
    torch.testing.assert_close(torch.cat([model(x[:4]), model(x[4:])]), logits)
    assert MaskNet(CARDS, 4, kind, hidden=(6,), out_dim=3)(x).shape == (9, 3)
    spread = MaskNet((5000,), 10, embedding_std=0.3).embed.embedding.weight.std()
    assert abs(spread - 0.3) < 0.01


def test_dropout_only_acts_in_training():
    for build in NETS.values():
        net, emb = build(3, 4, hidden=(32, 32), dropout=0.5), torch.randn(7, 3, 4)
        assert not torch.equal(net(emb), net(emb))
        net.eval()
        assert torch.equal(net(emb), net(emb))
        assert net.blocks[0](emb.flatten(1), emb.flatten(1)).count_nonzero() > 0


# --- what comes in practice


@pytest.mark.parametrize("kind", NETS)
def test_gradients_are_those_of_the_function(kind):
    net = stirred(NETS[kind](2, 3, hidden=(4,)))
    emb = torch.randn(3, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(net, emb)
    assert torch.autograd.gradgradcheck(net, emb)


@pytest.mark.parametrize("kind", NETS)
def test_constant_embeddings_give_finite_numbers(kind):
    net, emb = NETS[kind](3, 4, hidden=(5,)), torch.ones(6, 3, 4, requires_grad=True)
    out = net(emb)
    out.sum().backward()
    assert out.isfinite().all() and emb.grad.isfinite().all()


@pytest.mark.parametrize("kind", NETS)
def test_one_bad_row_spoils_no_other(kind):
    net, emb = NETS[kind](3, 4, hidden=(5,)), torch.randn(6, 3, 4)
    emb[2, 1, 1] = float("nan")
    out = net(emb)
    assert out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("kind", NETS)
def test_views_and_small_batches(kind):
    net = NETS[kind](3, 4, hidden=(5,))
    view = torch.randn(4, 3, 9).permute(2, 1, 0)
    torch.testing.assert_close(net(view), net(view.contiguous()))
    assert net(torch.randn(0, 3, 4)).shape == (0, 1)
    assert net(torch.randn(1, 3, 4)).shape == (1, 1)


@pytest.mark.parametrize("kind", NETS)
def test_double_and_half_precision(kind):
    net, emb = NETS[kind](3, 4, hidden=(5,)), torch.randn(6, 3, 4)
    expected = net(emb)
    for dtype in (torch.float16, torch.bfloat16):
        half = NETS[kind](3, 4, hidden=(5,)).to(dtype)
        half.load_state_dict(net.state_dict())
        torch.testing.assert_close(half(emb.to(dtype)).float(), expected, atol=0.15, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = net(emb)
        near.float().sum().backward()
    torch.testing.assert_close(near.float(), expected, atol=0.1, rtol=0.1)
    assert all(p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(net.double()(emb.double()), expected.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", NETS)
def test_compiles_in_one_graph(plain_python, kind):
    torch._dynamo.reset()
    model = MaskNet(CARDS, 4, kind, hidden=(6,))
    x = torch.stack([torch.randint(card, (9,)) for card in CARDS], dim=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x, return_masks=True)[1], model(x, return_masks=True)[1])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_no_more_memory_than_a_loop_over_fields():
    norm, emb = FieldLayerNorm(39, 10), torch.randn(64, 39, 10)
    single = nn.ModuleList(nn.LayerNorm(10) for _ in range(39))

    def loop(emb):
        parts = emb.chunk(39, dim=1)
        return torch.cat([layer(part) for layer, part in zip(single, parts, strict=True)], dim=1)

    with torch.no_grad():
        assert peak_memory(norm, emb) < 0.7 * peak_memory(loop, emb)


def test_weights_survive_a_state_dict():
    torch.manual_seed(1)
    model = MaskNet(CARDS, 4, hidden=(6,))
    other = MaskNet(CARDS, 4, hidden=(6,))
    other.load_state_dict(model.state_dict())
    x = torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(model(x), other(x))
    assert "net.blocks.0.mask.aggregate.weight" in model.state_dict()
    assert "embed.offsets" not in model.state_dict()


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InstanceGuidedMask(4, 50, 0.01), r"at least 1/50 .* gives aggregation width 0"),
        (lambda: InstanceGuidedMask(4, 50, -1.0), "reduction_ratio must be positive"),
        (lambda: InstanceGuidedMask(4, 50, float("nan")), "reduction_ratio must be positive"),
        (lambda: InstanceGuidedMask(0, 5), "input_dim must be at least 1, got 0"),
        (lambda: InstanceGuidedMask(4, 0), "output_dim must be at least 1, got 0"),
        (
            lambda: InstanceGuidedMask(4, 5, activation="gelu"),
            r"'identity'\], got 'gelu'",
        ),
        (lambda: FieldLayerNorm(0, 4), "num_fields must be at least 1, got 0"),
        (lambda: MaskBlock(4, 5, 0), "out_dim must be at least 1, got 0"),
        (lambda: MaskBlock(4, 5, 6, mask=False, ffn=False), "mask and ffn must not both be False"),
        (lambda: MaskBlock(4, 5, 6, dropout=1.5), r"dropout must be in \[0, 1\], got 1.5"),
        (lambda: SerialMaskNet(3, 4, hidden=()), r"len\(hidden\) must be at least 1, got 0"),
        (lambda: SerialMaskNet(3, 4, hidden=(5, 0)), "out_dim must be at least 1, got 0"),
        (lambda: SerialMaskNet(3, 4, init="he"), r"init must be one of .*got 'he'"),
        (lambda: ParallelMaskNet(3, 4, num_blocks=0), "num_blocks must be at least 1, got 0"),
        (lambda: MaskNet(CARDS, kind="paralel"), "did you mean 'parallel'"),
        (lambda: MaskNet((), 4), "cards must hold an id or more a field"),
    ],
)
def test_wrong_options_are_named(plain_python, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskBlock(4, 5, 6)(torch.ones(3, 9), torch.ones(3, 5)), r"v_emb .*batch, 4.*3, 9"),
        (lambda: MaskBlock(4, 5, 6)(torch.ones(3, 4), torch.ones(3, 4)), r"v_in .*3, 5.*3, 4"),
        (lambda: MaskBlock(4, 5, 6)(torch.ones(3, 4), torch.ones(1, 5)), r"v_in .*3, 5.*1, 5"),
        (lambda: InstanceGuidedMask(4, 5)(torch.ones(4)), r"v_emb must be \(batch, 4\)"),
        (lambda: FieldLayerNorm(3, 4)(torch.ones(2, 4, 3)), r"emb .*batch, 3, 4.*2, 4, 3"),
        (lambda: SerialMaskNet(3, 4)(torch.ones(2, 12)), r"emb .*batch, 3, 4.*2, 12"),
        (lambda: MaskNet(CARDS)(torch.tensor([[0, 7, 0]])), r"field 1: id 7 .*\[0, 7\)"),
        (lambda: MaskNet(CARDS)(torch.tensor([[0, 0]])), r"x must be \(batch, 3\)"),
        (lambda: MaskNet(CARDS)(torch.ones(2, 3)), "x must be whole numbers, got torch.float32"),
    ],
)
def test_wrong_tensors_are_named(plain_python, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the authors' own numbers


def load_block(block, tensors, i=0):
    with torch.no_grad():
        block.mask.aggregate.weight.copy_(tensors[f"A{i}"])
        block.mask.aggregate.bias.copy_(tensors[f"a{i}"])
        block.mask.project.weight.copy_(tensors[f"P{i}"])
        block.mask.project.bias.copy_(tensors[f"p{i}"])
        block.linear.weight.copy_(tensors[f"W{i}"])
        if block.norm is not None:
            block.norm.weight.copy_(tensors[f"g{i}"])
            block.norm.bias.copy_(tensors[f"h{i}"])


def load_net(net, tensors):
    net.double()
    for i, block in enumerate(net.blocks):
        load_block(block, tensors, i)
    linears = [layer for layer in net.head.modules() if isinstance(layer, nn.Linear)]
    names = [("w_out", "b_out")] if len(linears) == 1 else [("M0", "m0"), ("w_out", "b_out")]
    with torch.no_grad():
        for layer, (weight, bias) in zip(linears, names, strict=True):
            layer.weight.copy_(tensors[weight])
            layer.bias.copy_(tensors[bias])
        if net.emb_norm is not None:
            net.emb_norm.weight.copy_(tensors["ln_weight"])
            net.emb_norm.bias.copy_(tensors["ln_bias"])
    return net


def options_of(case, *left_out):
    return {k: v for k, v in case.settings.items() if k not in ("kind", *left_out)}


def one_pass(case):
    net = load_net(NETS[case.settings["kind"]](**options_of(case)), case.tensors)
    emb = case.tensors["emb"].clone().requires_grad_()
    output, masks = net(emb, return_masks=True)
    output.square().sum().backward()
    block, loss = net.blocks[0], "gradient of sum(output**2) w.r.t."
    return {
        "output": output,
        "mask of block 0": masks[0],
        "mask of block 1": masks[1],
        f"{loss} emb": emb.grad,
        f"{loss} ln_weight": net.emb_norm.weight.grad,
        f"{loss} P0": block.mask.project.weight.grad,
        f"{loss} W0": block.linear.weight.grad,
        f"{loss} g0": block.norm.weight.grad,
    }


def one_block(case):
    block = MaskBlock(**options_of(case)).double()
    load_block(block, case.tensors)
    v_emb, v_in = (case.tensors[name].clone().requires_grad_() for name in ("v_emb", "v_in"))
    output, mask = block(v_emb, v_in, return_mask=True)
    output.square().sum().backward()
    loss = "gradient of sum(output**2) w.r.t."
    return {
        "output": output,
        "mask": mask,
        f"{loss} v_emb": v_emb.grad,
        f"{loss} v_in": v_in.grad,
        f"{loss} A0": block.mask.aggregate.weight.grad,
        f"{loss} W0": block.linear.weight.grad,
    }


def three_steps(case):
    options = options_of(case, "steps", "lr", "optimiser")
    net = load_net(SerialMaskNet(**options), case.tensors)
    descent = torch.optim.SGD(net.parameters(), lr=case.settings["lr"])
    y = case.tensors["y"].double().flatten()
    losses = []
    for _ in range(case.settings["steps"]):
        loss = F.binary_cross_entropy_with_logits(net(case.tensors["emb"])[:, 0], y)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.detach())
    return {
        "losses before each step": torch.stack(losses),
        "output after the steps": net(case.tensors["emb"]),
        "A0 after the steps": net.blocks[0].mask.aggregate.weight,
        "W0 after the steps": net.blocks[0].linear.weight,
    }


RECOMPUTE = {
    "serial, two blocks, layer norm on the embedding and the hidden units": one_pass,
    "parallel, two blocks, one row": one_pass,
    "one block without layer norm, with its mask": one_block,
    "serial without any layer norm, three SGD steps": three_steps,
}


@pytest.mark.parametrize("case", [*load_reference("masknet")], ids=lambda c: c.name)
def test_against_the_public_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
