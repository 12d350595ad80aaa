"""ARM-Net: entmax, exponential neurons, the whole model, what its weights explain."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.click_through.arm_net import (
    ARMModule,
    ARMNet,
    SparseAttention,
    entmax,
    entmax_by_halving,
    global_importance,
    interaction_terms,
    local_importance,
)
from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.reference import load_reference

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)
ALPHAS = [1.0, 1.01, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- entmax


@SMALL
@given(SEEDS, st.integers(1, 9), st.sampled_from(ALPHAS), st.floats(0.1, 30))
def test_shares_sum_to_one_keep_the_order_and_know_no_offset(seed, n, alpha, scale):
    z = scale * normal(4, n, seed=seed)
    p = entmax(z, alpha)
    assert (p >= 0).all() and torch.allclose(p.sum(-1), torch.ones(4).double(), atol=1e-9)
    assert torch.allclose(entmax(z + 7, alpha), p, atol=1e-9)
    order = z.argsort(-1)
    assert (p.gather(-1, order).diff(dim=-1) >= -1e-12).all()
    shuffle = torch.randperm(n)
    assert torch.allclose(entmax(z[:, shuffle], alpha), p[:, shuffle], atol=1e-12)


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.5, 1.99])
@pytest.mark.parametrize("scale", [1, 300])
def test_newton_reaches_the_last_digit(alpha, scale):
    z = scale * normal(200, 10)
    assert (entmax(z, alpha) - entmax_by_halving(z, alpha, 80)).abs().max() < 1e-9


def test_alpha_one_is_softmax_and_just_above_it_nearly():
    z = normal(5, 7)
    assert torch.equal(entmax(z, 1.0), z.softmax(-1))
    assert torch.allclose(entmax(z, 1.0001), z.softmax(-1), atol=1e-3)


@SMALL
@given(SEEDS, st.integers(1, 9))
def test_alpha_two_is_the_projection_onto_the_simplex(seed, n):
    z = 2 * normal(n, seed=seed)
    p = entmax(z, 2.0)
    # Nearer than any other point of the simplex: the angle to each corner is not acute.
    assert ((z - p) @ (torch.eye(n).double() - p).T <= 1e-9).all()


def test_sparsemax_by_hand():
    p = entmax(torch.tensor([0.2, 1.0, 0.9]), 2.0)
    assert torch.allclose(p, torch.tensor([0.0, 0.55, 0.45]))


def test_the_support_shrinks_as_alpha_grows():
    z = normal(300, 8)
    support = [(entmax(z, alpha) > 0).double().sum(-1).mean() for alpha in (1.0, 1.3, 1.7, 2, 3)]
    assert support[0] == 8 and support == sorted(support, reverse=True)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_exact_and_sum_to_zero(alpha):
    z = normal(3, 5, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha), z)
    (slope,) = torch.autograd.grad((entmax(z, alpha) * normal(3, 5)).sum(), z)
    assert slope.sum(-1).abs().max() < 1e-12


def test_another_dimension_is_a_transpose():
    cube = normal(2, 4, 3)
    assert torch.equal(entmax(cube, 1.5, dim=1), entmax(cube.mT, 1.5).mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 1.7, 2.0])
def test_half_precision_is_computed_in_float32(dtype, alpha):
    z = normal(4, 6).to(dtype)
    found = entmax(z, alpha)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), entmax(z.float(), alpha), atol=1e-2)


def test_nan_stays_nan_and_minus_infinity_is_closed():
    assert entmax(torch.tensor([0.0, math.nan]), 1.5).isnan().all()
    assert entmax(torch.tensor([0.3, 0.2, -math.inf]), 1.5)[2] == 0


# ---------------------------------------------------------------- exponential neurons


class Powers(nn.Module):
    """Weights that are given."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, e):
        return self.w.expand(len(e), 1, *self.w.shape)


def neuron(w, e):
    module = ARMModule(e.shape[1], e.shape[2], heads=1, neurons=len(w))
    module.attention = Powers(w)
    return module(e)


def test_a_neuron_is_a_monomial_of_exponentials():
    a = normal(4, 3, 2).abs() + 0.1
    w = torch.tensor([[1.0, 1, 0], [2, -1, 0], [0, 0, 0], [0, 0, 1]]).double()
    y = neuron(w, a.log())
    assert torch.allclose(y[:, 0], a[:, 0] * a[:, 1])
    assert torch.allclose(y[:, 1], a[:, 0] ** 2 / a[:, 1])
    assert torch.allclose(y[:, 2], torch.ones(4, 2).double())
    assert torch.allclose(y[:, 3], a[:, 2])
    assert torch.allclose(neuron(w[:1] + w[1:2], a.log()), y[:, :1] * y[:, 1:2])


def written(attention, e):
    scores = torch.einsum("bfx,kxy,koy->bkof", e, attention.bilinear, attention.query)
    gates = entmax(scores / attention.query.shape[-1] ** 0.5, attention.alpha)
    return gates, gates * attention.values


@pytest.mark.parametrize("d_k", [None, 2, 5])
def test_the_folded_query_gives_the_same_weights(d_k):
    module, e = (
        ARMModule(5, 3, heads=2, neurons=4, d_k=d_k, query_scale=4).double(),
        normal(6, 5, 3),
    )
    gates, w = written(module.attention, e)
    assert torch.allclose(module.attention.gates(e), gates, atol=1e-12)
    assert torch.allclose(module(e), torch.exp(w.flatten(1, 2) @ e), atol=1e-12)
    assert module(e).shape == (6, 8, 3)


def test_a_closed_field_has_no_gradient():
    module = ARMModule(6, 3, heads=1, neurons=2, alpha=2.0, query_scale=20).double()
    e = normal(8, 6, 3).requires_grad_()
    module(e).sum().backward()
    closed = (module.attention.gates(e) == 0).all(2).squeeze(1)
    assert closed.any() and (e.grad[closed] == 0).all()


def test_the_first_weights_take_the_fans_of_three_dimensions():
    attention = SparseAttention(40, 30, heads=8, neurons=16)
    for parameter in (attention.bilinear, attention.query, attention.values):
        first, second, third = parameter.shape
        bound = 1.414 * (6 / (second * third + first * third)) ** 0.5
        assert 0.9 * bound < parameter.abs().max() <= bound
    scaled = SparseAttention(40, 30, heads=8, neurons=16, query_scale=10)
    assert scaled.query.abs().max() > 5 * attention.query.abs().max()


def test_costs_grow_with_fields_and_neurons():
    def products(fields, neurons):
        module = ARMModule(fields, 10, heads=1, neurons=neurons)
        return count_flops(module, torch.randn(64, fields, 10)) // 2

    once = 16 * 10 * 10
    assert products(10, 16) == once + 64 * 2 * 16 * 10 * 10
    assert products(40, 16) - once == 4 * (products(10, 16) - once)


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize(
    ("fields", "heads", "neurons", "hidden", "expected"),
    [
        (10, 8, 32, (300, 300), 866_533),
        (3, 1, 16, (300, 300), 140_441),
        (22, 1, 32, (200, 200, 200), 147_189),
        (39, 4, 64, (500, 500), 1_546_957),
        (43, 32, 1, (300,), 102_161),
        (8, 1, 16, (32,), 5_669),
        (8, 1, 32, (32,), 11_109),
    ],
)
def test_parameters_without_embeddings(fields, heads, neurons, hidden, expected):
    model = ARMNet(1, fields, 10, heads, neurons, hidden=hidden)
    assert sum(p.numel() for p in model.parameters()) - 10 == expected


def test_values_scale_embeddings_and_are_left_alone():
    model = ARMNet(9, 3, 4, 2, 3, hidden=(5,)).eval()
    ids = torch.tensor([[0, 3, 6], [1, 4, 8]])
    assert torch.equal(model(ids, torch.ones(2, 3)), model(ids))
    values = torch.tensor([[0.5, 1.5, 0.0], [1.0, 0.2, -3.0]])
    before = values.clone()
    scaled = model.embed(ids, values)
    assert torch.equal(values, before)
    assert torch.allclose(scaled[0, 0], 0.5 * model.embedding.weight[0])
    assert torch.equal(scaled[0, 1], model.embedding.weight[3])
    assert torch.allclose(scaled[0, 2], 0.001 * model.embedding.weight[6])


@pytest.mark.parametrize("options", [{}, {"ensemble": True}, {"single_head": True}, {"out_dim": 3}])
def test_shapes_splits_and_a_batch_of_one(options):
    torch.manual_seed(0)
    model = ARMNet(9, 3, 4, 2, 3, hidden=(5,), ensemble_hidden=(4,), **options).eval()
    ids = torch.tensor([[0, 3, 6], [1, 4, 8], [2, 5, 7]])
    tail = (3,) if options.get("out_dim") else ()
    assert model(ids).shape == (3, *tail) and model(ids[:1]).shape == (1, *tail)
    assert torch.allclose(model(ids)[1:2], model(ids[1:2]), atol=1e-6)
    assert model(ids[:0]).shape == (0, *tail)
    strided = torch.stack([ids, ids], -1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(model(strided), model(ids))


def test_the_ensemble_starts_as_a_mean_and_one_head_as_a_layer():
    model = ARMNet(9, 3, 4, 2, 3, ensemble=True)
    assert (model.mix.weight == 0.5).all() and (model.mix.bias == 0).all()
    assert model.embedding2 is not model.embedding
    single = ARMNet(9, 3, 64, 2, 3, single_head=True).arm.attention
    assert single.query.shape == (1, 6, 64) and single.bilinear.shape == (1, 64, 64)
    assert 0.9 / 8 < single.bilinear.abs().max() <= 1 / 8


def test_normalisation_folds_into_the_first_layer():
    torch.manual_seed(0)
    model = ARMNet(9, 3, 4, 2, 3, hidden=(5,)).double()
    ids = torch.randint(0, 3, (50, 3)) + torch.tensor([0, 3, 6])
    for _ in range(20):
        model(ids)
    model.eval()
    norm, first = model.norm, model.mlp[0]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).repeat_interleave(4)
    shift = norm.bias.repeat_interleave(4) - scale * norm.running_mean.repeat_interleave(4)
    neurons = model.arm(model.embed(ids)).flatten(1)
    folded = neurons @ (first.weight * scale).T + first.bias + first.weight @ shift
    assert torch.allclose(model.mlp[1:](folded).squeeze(1), model(ids))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, 2.0, 2.5])
def test_one_graph_autocast_and_double(alpha, plain_python):
    model = ARMNet(9, 3, 4, 2, 3, alpha, hidden=(5,)).eval()
    ids = torch.tensor([[0, 3, 6], [1, 4, 8]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = model(ids)
    assert torch.allclose(compiled(ids), plain, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(ids).float(), plain, atol=0.1)
    assert model.double()(ids).dtype == torch.float64


def test_it_learns_a_product_and_a_broken_gate_does_not():
    torch.manual_seed(0)
    ids = torch.randint(0, 2, (512, 2)) + torch.tensor([0, 2])
    y = (ids[:, 0] == ids[:, 1] - 2).float()
    model = ARMNet(4, 2, 8, 1, 8, hidden=(16,), query_scale=10)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


# ---------------------------------------------------------------- explanations


def test_importance_is_the_size_of_values_and_weights():
    model = ARMNet(9, 3, 4, 2, 3, alpha=1.5).eval()
    ids = torch.tensor([[0, 3, 6], [1, 4, 8]])
    attention = model.arm.attention
    assert torch.allclose(global_importance(model), attention.values.abs().sum((0, 1)))
    w = attention(model.embed(ids))
    assert torch.allclose(local_importance(model, ids), w.abs().sum((1, 2)))
    assert local_importance(model, ids, torch.rand(2, 3)).shape == (2, 3)


def test_terms_count_rows_and_neurons():
    torch.manual_seed(0)
    model = ARMNet(30, 5, 4, 2, 3, alpha=2.0, query_scale=30).eval()
    ids = torch.randint(0, 6, (40, 5)) + 6 * torch.arange(5)
    gates = model.arm.attention.gates(model.embed(ids)).reshape(-1, 5)
    terms = interaction_terms(model, ids, top=1000)
    for frequency, order, fields in terms:
        alike = [tuple(row.nonzero().flatten().tolist()) == fields for row in gates]
        assert order == len(fields) and frequency == pytest.approx(sum(alike) / len(gates))
        assert list(fields) == sorted(fields)
    frequencies = [frequency for frequency, *_ in terms]
    assert frequencies == sorted(frequencies, reverse=True)
    assert sum(frequencies) == pytest.approx(1)
    assert interaction_terms(model, ids, top=2) == terms[:2]
    dense = ARMNet(30, 5, 4, 2, 3, alpha=1.0)
    assert interaction_terms(dense, ids) == [(1.0, 5, (0, 1, 2, 3, 4))]


# ---------------------------------------------------------------- the authors' numbers


def of_entmax(case):
    z, v = case.tensors["z"].requires_grad_(), case.tensors["v"]
    found = {"output for cube, alpha 1.5, dim 1": entmax(case.tensors["cube"], 1.5, dim=1)}
    for alpha in case.settings["alphas"]:
        p = entmax(z, alpha)
        (slope,) = torch.autograd.grad((p * v).sum(), z)
        found |= {f"output, alpha {alpha}": p, f"gradient w.r.t. z, alpha {alpha}": slope}
    return found


def load_weights(model, tensors):
    attention = model.arm.attention
    pairs = {"E": model.embedding.weight, "W": attention.bilinear, "Q": attention.query}
    pairs |= {"v": attention.values, "w_out": model.mlp[-1].weight, "b_out": model.mlp[-1].bias}
    norms = {"Bn": model.norm, "Bm": model.mlp[1]}
    pairs |= {"M0": model.mlp[0].weight, "m0": model.mlp[0].bias}
    if "M1" in tensors:
        pairs |= {"M1": model.mlp[3].weight, "m1": model.mlp[3].bias}
        norms["Bo"] = model.mlp[4]
    if "mix" in tensors:
        pairs |= {"E2": model.embedding2.weight, "D0": model.mlp2[0].weight}
        pairs |= {"d0": model.mlp2[0].bias, "D1": model.mlp2[-1].weight, "d1": model.mlp2[-1].bias}
        pairs |= {"mix": model.mix.weight, "mix_bias": model.mix.bias}
        norms["Bd"] = model.mlp2[1]
    for name, norm in norms.items():
        parts = {"g": norm.weight, "h": norm.bias, "mu": norm.running_mean, "var": norm.running_var}
        pairs |= {name + part: tensor for part, tensor in parts.items()}
    unused = set(tensors) - set(pairs) - {"ids", "values"}
    assert not unused, unused
    with torch.no_grad():
        for name, tensor in pairs.items():
            if name in tensors:
                tensor.copy_(tensors[name].reshape(tensor.shape))
    return pairs


def of_model(case):
    options = {key: value for key, value in case.settings.items() if key != "mode"}
    for name in ("hidden", "ensemble_hidden"):
        if name in options:
            options[name] = tuple(options[name])
    model = ARMNet(**options).double().train(case.settings["mode"] == "train")
    pairs = load_weights(model, case.tensors)
    ids, values = case.tensors["ids"].long(), case.tensors["values"]
    logits = model(ids, values)
    logits.square().sum().backward()
    with torch.no_grad():
        e = model.embed(ids, values)
        gates, weights = model.arm.attention.gates(e), model.arm.attention(e)
    found = {"logits": logits, "gates (B, K, o, m)": gates, "weights (B, K, o, m)": weights}
    for name in ("E", "W", "Q", "v", "E2"):
        if name in pairs:
            slope = pairs[name].grad
            shaped = slope.reshape(case.tensors[name].shape)
            found[f"gradient of sum(logits**2) w.r.t. {name}"] = shaped
    found["running mean of Bn afterwards"] = model.norm.running_mean
    found["running variance of Bn afterwards"] = model.norm.running_var
    return {name: value for name, value in found.items() if name in case.expected}


@pytest.mark.parametrize("case", list(load_reference("arm_net")), ids=lambda case: case.name)
def test_against_the_authors(case, agree):
    agree(case, (of_entmax if "z" in case.tensors else of_model)(case))


# ---------------------------------------------------------------- bad input


IDS = torch.tensor([[0, 3, 6]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entmax(torch.zeros(3), 0.5), r"alpha must be >= 1 and finite, got 0\.5"),
        (lambda: entmax(torch.zeros(3), math.nan), "alpha must be >= 1"),
        (lambda: entmax(torch.zeros(2, 0)), "entries of z must be at least 1, got 0"),
        (lambda: entmax(torch.zeros(3), 1.5, n_iter=0), "n_iter must be at least 1"),
        (lambda: SparseAttention(3, 4, alpha=0.9), "alpha must be >= 1"),
        (lambda: SparseAttention(3, 4, heads=0), r"heads \* neurons must be >= 1, got 0 \* 32"),
        (lambda: SparseAttention(0, 4), "num_fields must be at least 1"),
        (lambda: ARMModule(3, 4)(torch.zeros(2, 4, 4)), r"e must be \(batch, 3, 4\)"),
        (lambda: ARMNet(9, 3)(IDS[:, :2]), r"ids must have shape \(B, 3\), got \(1, 2\)"),
        (lambda: ARMNet(9, 3)(IDS[0]), r"ids must have shape \(B, 3\), got \(3,\)"),
        (lambda: ARMNet(9, 3)(IDS.float()), "ids must be whole numbers"),
        (lambda: ARMNet(9, 3)(IDS + 3), r"ids out of range: must be in 0\.\.8, got 3 to 9"),
        (lambda: ARMNet(9, 3)(IDS - 1), "ids out of range"),
        (lambda: ARMNet(9, 3)(IDS, torch.ones(1, 2)), "values must have the shape of ids"),
        (lambda: ARMNet(9, 3)(IDS, torch.full((1, 3), math.nan)), "values must be numbers"),
        (lambda: ARMNet(0, 3), "num_features must be at least 1"),
        (lambda: interaction_terms(ARMNet(9, 3), IDS, top=0), "top must be at least 1"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
