"""DCN V2: cross layers, their mixtures, the whole model, and what its matrices say."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.click_through.dcn_v2 import (
    CROSSES,
    STRUCTURES,
    CrossLayer,
    CrossLayerV1,
    CrossNetMix,
    CrossNetV1,
    CrossNetV2,
    DCNv2,
    block_norms,
    mix_as_written,
    numerical_rank,
    poly_targets,
)
from shuffle_nb.foundations.reference import load_reference

CARDS = (5, 4, 3)
IDS = torch.tensor([[4, 3, 2], [0, 0, 0], [2, 1, 1]])
NETS = {
    "v1": lambda d: CrossNetV1(d),
    "full": lambda d: CrossNetV2(d),
    "low rank": lambda d: CrossNetV2(d, rank=2),
    "mix": lambda d: CrossNetMix(d, num_experts=3, rank=2),
    "mix, sigmoid": lambda d: CrossNetMix(d, num_experts=3, rank=2, gate="sigmoid"),
    "mix, constant, no C": lambda d: CrossNetMix(
        d, num_experts=2, rank=3, gate="constant", activation=None
    ),
    "mix, gate of each layer": lambda d: CrossNetMix(
        d, num_experts=3, rank=2, gate_per_layer=True, activation="identity"
    ),
}
every_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def filled(module):
    """No weight is zero, biases included."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def rows(count, dim):
    return torch.randn(count, dim, dtype=torch.float64)


# The layers ----------------------------------------------------------------------------------


def test_a_cross_layer_is_its_formula():
    layer, x0, x = filled(CrossLayer(4)), rows(6, 4), rows(6, 4)
    expected = x0 * (x @ layer.W.T + layer.bias) + x
    torch.testing.assert_close(layer(x0, x), expected)
    torch.testing.assert_close(layer(x0), layer(x0, x0))
    torch.testing.assert_close(filled(CrossLayer(4, bias=False))(x0, x).shape, x.shape)


def test_the_first_layer_has_its_bias_outside():
    layer, x0, x = filled(CrossLayerV1(4)), rows(6, 4), rows(6, 4)
    expected = x0 * (x @ layer.weight)[:, None] + layer.bias + x
    torch.testing.assert_close(layer(x0, x), expected)


def test_equal_rows_are_the_first_layer():
    v1, v2 = filled(CrossLayerV1(5)), filled(CrossLayer(5))
    with torch.no_grad():
        v1.bias.zero_(), v2.bias.zero_(), v2.W.copy_(v1.weight.expand(5, 5))
    x0, x = rows(7, 5), rows(7, 5)
    torch.testing.assert_close(v1(x0, x), v2(x0, x), rtol=0, atol=1e-12)


def test_low_rank_of_full_rank_is_full():
    full, low = filled(CrossLayer(5)), filled(CrossLayer(5, rank=5))
    with torch.no_grad():
        low.U.copy_(full.W), low.V.copy_(torch.eye(5)), low.bias.copy_(full.bias)
    x0, x = rows(7, 5), rows(7, 5)
    torch.testing.assert_close(low(x0, x), full(x0, x))
    torch.testing.assert_close(low.matrix(), full.matrix())


def test_preactivation_comes_before_the_diagonal():
    layer = filled(CrossLayer(5, rank=2, diag_scale=0.3, preactivation=torch.tanh))
    x0, x = rows(7, 5), rows(7, 5)
    inside = torch.tanh(x @ layer.matrix().T + layer.bias) + 0.3 * x
    torch.testing.assert_close(layer(x0, x), x0 * inside + x)


def test_zero_weights_are_the_identity_and_a_bias_of_minus_one_empties():
    layer, x = CrossLayer(4).double(), rows(3, 4)
    with torch.no_grad():
        layer.W.zero_()
        assert torch.equal(layer(x), x)
        layer.bias.fill_(-1.0)
        assert not layer(x).any()


# A polynomial of its input -------------------------------------------------------------------


@given(st.integers(1, 4), st.floats(-2, 2), st.booleans())
@settings(deadline=None)
def test_without_additions_only_one_degree_is_left(num_layers, t, first):
    make = CrossNetV1 if first else CrossNetV2
    net = filled(make(5, num_layers, bias=False, residual=False))
    x = rows(3, 5)
    expected = t ** (num_layers + 1) * net(x)
    torch.testing.assert_close(net(t * x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_a_degree_each_layer(num_layers):
    net, x = filled(CrossNetV2(4, num_layers, bias=False)), rows(1, 4)
    values = net(torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None] * x)
    assert torch.diff(values, n=num_layers + 2, dim=0).abs().max() < 1e-8
    assert torch.diff(values, n=num_layers + 1, dim=0).abs().max() > 1e-4


def test_coefficients_are_sums_of_products_of_weights():
    """Two layers: each monomial of degree 3 collects W0 and W1 over orders of its indices."""
    net, d = filled(CrossNetV2(3, 2, bias=False, residual=False)), 3
    first, second = (layer.W for layer in net.layers)
    x = rows(4, d)
    expected = sum(
        second[i, j] * first[j, k] * x[:, i] * x[:, j] * x[:, k]
        for i, j, k in itertools.product(range(d), repeat=3)
    )
    torch.testing.assert_close(net(x).sum(1), expected)


def test_a_factorization_machine_is_one_layer():
    fields, size = 4, 3
    pair_weights = torch.randn(fields, fields, dtype=torch.float64).triu(1)
    layer = CrossLayer(fields * size, bias=False, residual=False).double()
    with torch.no_grad():
        layer.W.copy_(torch.kron(pair_weights, torch.eye(size, dtype=torch.float64)))
    x = rows(6, fields * size)
    e = x.unflatten(1, (fields, size))
    expected = sum(
        pair_weights[i, j] * (e[:, i] * e[:, j]).sum(1)
        for i, j in itertools.combinations(range(fields), 2)
    )
    torch.testing.assert_close(layer(x).sum(1), expected)


def test_coordinates_may_be_renamed():
    net, order = filled(CrossNetV2(6, 2)), torch.randperm(6)
    other = filled(CrossNetV2(6, 2))
    with torch.no_grad():
        for ours, renamed in zip(net.layers, other.layers, strict=True):
            renamed.W.copy_(ours.W[order][:, order]), renamed.bias.copy_(ours.bias[order])
    x = rows(5, 6)
    torch.testing.assert_close(other(x[:, order]), net(x)[:, order])


# Mixtures ------------------------------------------------------------------------------------


@every_net
def test_rows_do_not_touch_each_other(make):
    net, x = filled(make(6)), rows(5, 6)
    together = net(x)
    torch.testing.assert_close(torch.cat([net(x[:1]), net(x[1:])]), together)
    assert net(x[:1]).shape == (1, 6) and net(x[:0]).shape == (0, 6)
    torch.testing.assert_close(net(x.T.contiguous().T), together)
    x[0, 0] = torch.nan
    torch.testing.assert_close(net(x)[1:], together[1:])


@every_net
def test_without_gradients_the_numbers_stay(make):
    net, x = filled(make(6)), rows(5, 6)
    with torch.no_grad():
        found = net(x)
    torch.testing.assert_close(net(x), found)


@every_net
def test_gradients(make):
    net, x = filled(make(5)), rows(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(net, (x,))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "constant"])
@pytest.mark.parametrize("activation", [None, "identity", "tanh", torch.relu])
@pytest.mark.parametrize("gate_per_layer", [False, True])
def test_the_fast_mixture_is_the_formula(gate, activation, gate_per_layer):
    options = {"gate": gate, "activation": activation, "gate_per_layer": gate_per_layer}
    net, x = filled(CrossNetMix(7, 3, num_experts=3, rank=2, **options)), rows(9, 7)
    torch.testing.assert_close(net(x), mix_as_written(net, x))


def test_one_open_expert_is_a_low_rank_layer():
    mix = filled(CrossNetMix(6, 2, num_experts=1, rank=3, activation=None, gate="constant"))
    low = filled(CrossNetV2(6, 2, rank=3))
    with torch.no_grad():
        for place, layer in enumerate(low.layers):
            layer.U.copy_(mix.U[place, 0]), layer.V.copy_(mix.V[place, 0])
            layer.bias.copy_(mix.bias[place])
    x = rows(5, 6)
    torch.testing.assert_close(mix(x), low(x))


@pytest.mark.parametrize(("gate", "factor"), [("softmax", 1), ("constant", 3)])
def test_equal_experts_act_as_their_gates_sum(gate, factor):
    several = filled(CrossNetMix(6, 1, num_experts=3, rank=2, gate=gate))
    single = filled(CrossNetMix(6, 1, num_experts=1, rank=2, gate="constant"))
    with torch.no_grad():
        for name in ("U", "V", "C"):
            getattr(several, name).copy_(getattr(single, name).expand(1, 3, -1, -1))
        several.bias.copy_(single.bias)
    x = rows(5, 6)
    torch.testing.assert_close(several(x) - x, factor * (single(x) - x))


def test_a_sigmoid_gate_weighs_the_bias_by_its_sum():
    net, x = filled(CrossNetMix(6, 1, num_experts=3, rank=2, gate="sigmoid")), rows(5, 6)
    with torch.no_grad():
        net.U.zero_()
    total = (x @ net.G[0].T).sigmoid().sum(1, keepdim=True)
    torch.testing.assert_close(net(x), x + x * total * net.bias[0])


def test_layers_share_the_gate_unless_told():
    shared, own = (CrossNetMix(6, 3, 4, 2, gate_per_layer=flag) for flag in (False, True))
    assert shared.G.shape == (1, 4, 6) and own.G.shape == (3, 4, 6)
    assert CrossNetMix(6, gate="constant", rank=2).G is None


def test_first_weights():
    full, low = CrossLayer(200), CrossLayer(200, rank=50)
    assert full.W.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.03)
    assert low.U.std().item() == pytest.approx((2 / 250) ** 0.5, rel=0.03)
    mix, fuxi = (CrossNetMix(100, 2, 4, 25, init=init) for init in ("xavier", "fuxictr"))
    assert mix.V.std().item() == pytest.approx((2 / 125) ** 0.5, rel=0.03)
    assert mix.C.std().item() == pytest.approx(0.2, rel=0.1)
    stack = torch.empty(4, 100, 25)
    expected = nn.init.xavier_normal_(stack).std().item()
    assert fuxi.U.std().item() == pytest.approx(expected, rel=0.05)
    assert not full.bias.any() and not mix.bias.any()
    v1 = torch.cat([CrossLayerV1(100).weight for _ in range(20)])
    assert v1.std().item() == pytest.approx(0.1, rel=0.1)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_formulas():
    d, layers, r, k = 12, 3, 4, 2
    assert count(CrossNetV2(d, layers)) == layers * (d * d + d)
    assert count(CrossNetV2(d, layers, rank=r)) == layers * (2 * d * r + d)
    assert count(CrossNetV1(d, layers)) == 2 * layers * d
    mix = layers * (2 * k * d * r + k * r * r + d) + k * d
    assert count(CrossNetMix(d, layers, k, r)) == mix
    for dim, first, second in ((4, 12, 24), (3, 9, 15), (100, 300, 10_200)):  # with an output
        assert count(CrossLayerV1(dim)) + dim == first and count(CrossLayer(dim)) + dim == second
    eight = (40, 40, 30, 30, 20, 20, 10, 10)
    options = {"structure": "crossnet_only", "embedding_dim": 8}
    sizes = {"full": {}, "low_rank": {"rank": 16}, "v1": {}}
    counts = [count(DCNv2(eight, cross=name, **options, **own)) for name, own in sizes.items()]
    assert [c - 200 * 8 for c in counts] == [12_545, 6_401, 449]
    mixed = {"cross": "mix", "num_experts": 2, "rank": 8}
    for activation, size in (("identity", 6913), (None, 6529)):
        model = DCNv2(eight, activation=activation, **mixed, **options)
        assert count(model) - 200 * 8 == size


# The whole model -----------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("cross", CROSSES)
def test_one_logit_a_row(structure, cross):
    model = DCNv2(CARDS, 4, structure=structure, cross=cross, num_dense=2).double()
    dense = rows(3, 2)
    logits = model(IDS, dense)
    assert logits.shape == (3,) and model(IDS[:1], dense[:1]).shape == (1,)
    assert model(IDS[:0], dense[:0]).shape == (0,)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_structures_are_what_they_say():
    models = {name: DCNv2(CARDS, 2, structure=name).double() for name in STRUCTURES}
    for name, model in models.items():
        x0 = model.embed(IDS).flatten(1)
        crossed = model.cross(x0)
        parts = {
            "crossnet_only": lambda m, x, c: [c],
            "parallel": lambda m, x, c: [c, m.deep[0](x)],
            "stacked": lambda m, x, c: [m.deep[0](c)],
            "stacked_parallel": lambda m, x, c: [m.deep[0](c), m.deep[1](x)],
        }[name](model, x0, crossed)
        expected = model.head(torch.cat(parts, 1))[:, 0]
        torch.testing.assert_close(model(IDS), expected)


def test_the_output_bias_and_rank_are_options():
    assert DCNv2(CARDS, out_bias=False).head.bias is None
    assert DCNv2(CARDS, 4, cross="low_rank").cross.layers[0].U.shape == (12, 3)
    assert DCNv2(CARDS, 4, cross="mix", num_experts=3).cross.U.shape == (3, 3, 12, 3)
    assert DCNv2(CARDS, 4, cross="full", bias=False).cross.layers[0].bias is None


# What a matrix says --------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(deadline=None)
def test_block_norms(dims):
    W = rows(sum(dims), sum(dims))
    blocks = [part.split(dims, 1) for part in W.split(dims, 0)]
    expected = torch.stack([torch.stack([b.norm() for b in row]) for row in blocks])
    torch.testing.assert_close(block_norms(W, dims), expected)


def test_numerical_rank():
    W = torch.diag(torch.tensor([4.0, 2.0, 0.5, 0.03]))
    assert [numerical_rank(W, tol) for tol in (0.6, 0.5, 0.1, 0.01, 0.001)] == [1, 2, 3, 3, 4]
    assert numerical_rank(torch.zeros(3, 3)) == 0 and numerical_rank(torch.ones(4, 2)) == 1
    assert numerical_rank(W.bfloat16(), 0.5) == 2


def test_targets():
    x = rows(5, 4)
    x1, x2, x3, x4 = x.T
    torch.testing.assert_close(poly_targets("f1")(x), x1**2 + x1 * x2 + x3 * x1 + x4 * x1)
    f2 = x1**2 + 0.1 * x1 * x2 + x2 * x3 + 0.1 * x3**2
    torch.testing.assert_close(poly_targets("f2")(x[:, :3]), f2)
    rng = np.random.default_rng(7)
    places, weights = rng.integers(0, 6, (9, 2)), rng.standard_normal(9)
    wide = rows(5, 6)
    f3 = sum(w * wide[:, i] * wide[:, j] for (i, j), w in zip(places, weights, strict=True))
    torch.testing.assert_close(poly_targets("f3", d=6, k=9, seed=7)(wide), f3)
    cubic, x = poly_targets("cubic", k=8), rows(4, 10)
    torch.testing.assert_close(cubic(-2 * x), -8 * cubic(x))


# Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: CrossLayer(4)(rows(2, 4), rows(2, 5)),
            "dimension mismatch of x0 and x, got 4 and 5",
        ),
        (
            lambda: CrossLayerV1(4)(rows(2, 5), rows(2, 4)),
            "dimension mismatch of x0 and x, got 5 and 4",
        ),
        (lambda: CrossLayer(4)(rows(2, 5)), r"x0 must be \(batch, 4\), got shape \(2, 5\)"),
        (lambda: CrossLayer(4)(rows(2, 4), rows(3, 4)), "as many rows, got 2 and 3"),
        (lambda: CrossNetMix(4, rank=2)(rows(2, 5)), r"x0 must be \(batch, 4\)"),
        (lambda: CrossNetV2(4)(rows(2, 4)[0]), r"x0 must be \(batch, 4\), got shape \(4,\)"),
        (lambda: CrossLayer(4, rank=5), r"rank must be in 1\.\.4, got 5"),
        (lambda: CrossLayer(4, rank=0), r"rank must be in 1\.\.4, got 0"),
        (lambda: CrossNetMix(4, rank=5), r"rank must be in 1\.\.4, got 5"),
        (lambda: CrossLayer(4, diag_scale=-0.1), "diag_scale must be non-negative"),
        (lambda: CrossLayer(4, diag_scale=float("nan")), "diag_scale must be non-negative"),
        (lambda: CrossNetV2(4, 0), "num_layers must be at least 1, got 0"),
        (lambda: CrossNetMix(4, 0, rank=1), "num_layers must be at least 1, got 0"),
        (lambda: CrossNetMix(4, rank=1, gate="softmx"), "did you mean 'softmax'"),
        (lambda: CrossNetMix(4, rank=1, activation="tan"), "did you mean 'tanh'"),
        (lambda: CrossNetMix(4, rank=1, init="he"), r"init must be one of \['xavier', 'fuxictr'\]"),
        (lambda: DCNv2(CARDS, structure="paralel"), "did you mean 'parallel'"),
        (lambda: DCNv2(CARDS, cross="fool"), "cross must be one of"),
        (lambda: DCNv2(CARDS, hidden=()), "hidden must hold a layer or more for 'parallel'"),
        (lambda: DCNv2(CARDS, num_cross_layers=0), "num_cross_layers must be at least 1"),
        (lambda: DCNv2(CARDS, num_dense=-1), "num_dense must be in"),
        (lambda: DCNv2(CARDS)(IDS + 1), r"field 0: id 5 out of range \[0, 5\)"),
        (lambda: DCNv2(CARDS)(IDS - 1), r"field 0: id -1 out of range"),
        (lambda: DCNv2(CARDS)(IDS[:, :2]), r"x must be \(batch, 3\), got shape \(3, 2\)"),
        (lambda: DCNv2(CARDS)(IDS, torch.ones(3, 1)), "dense must be None"),
        (lambda: DCNv2(CARDS, num_dense=2)(IDS), r"dense must be \(batch, 2\), got None"),
        (lambda: DCNv2(CARDS, num_dense=2)(IDS, torch.ones(3, 1)), r"dense must be \(3, 2\)"),
        (lambda: block_norms(torch.ones(4, 4), (2, 3)), r"W must be \(5, 5\), got shape \(4, 4\)"),
        (lambda: block_norms(torch.ones(4, 4), (4, 0)), r"field_dims\[1\] must be at least 1"),
        (lambda: numerical_rank(torch.ones(2, 2), 0.0), "tol must be positive"),
        (lambda: poly_targets("f4"), "name must be one of"),
        (lambda: poly_targets("f1", d=3), "d must be in 4"),
        (lambda: poly_targets("f1")(rows(2, 3)), r"x must be \(batch, 4\)"),
    ],
)
def test_bad_input(plain_python, call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Compilers, types ----------------------------------------------------------------------------


@every_net
def test_a_net_compiles_whole(plain_python, make):
    net, x = make(6), torch.randn(5, 6)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


def test_the_model_compiles_whole(plain_python):
    model = DCNv2(CARDS, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))


@every_net
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(make, dtype):
    net, x = make(16), torch.randn(8, 16)
    full = net(x)
    with torch.autocast("cpu", dtype=dtype):
        low = net(x)
        low.float().square().sum().backward()
    torch.testing.assert_close(low.float(), full, atol=0.1, rtol=0.1)
    assert net.to(dtype)(x.to(dtype)).dtype == dtype


@every_net
def test_weights_travel_through_a_state_dict(make):
    net, other, x = make(6), make(6), torch.randn(3, 6)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


# The authors' numbers ------------------------------------------------------------------------


def results(output, **leaves):
    output.square().sum().backward()
    what = "gradient of sum(output**2) w.r.t. "
    return {"output": output, **{f"{what}{name}": leaf.grad for name, leaf in leaves.items()}}


def three_full_layers(case):
    t, net = case.tensors, CrossNetV2(5, num_layers=3).double()
    with torch.no_grad():
        for place, layer in enumerate(net.layers):
            layer.W.copy_(t[f"W{place}"]), layer.bias.copy_(t[f"b{place}"])
    x0 = t["x0"].requires_grad_()
    first, _, last = net.layers
    return results(net(x0), x0=x0, W0=first.W, b0=first.bias, W2=last.W)


def one_low_rank_layer(case):
    t = case.tensors
    layer = CrossLayer(6, rank=2, diag_scale=0.35, preactivation=torch.tanh).double()
    with torch.no_grad():
        layer.U.copy_(t["U"]), layer.V.copy_(t["V"]), layer.bias.copy_(t["b"])
    x0, x = t["x0"].requires_grad_(), t["x"].requires_grad_()
    return results(layer(x0, x), x0=x0, x=x, V=layer.V, U=layer.U, b=layer.bias)


def mixture(case):
    t, net = case.tensors, CrossNetMix(5, num_layers=2, num_experts=3, rank=2).double()
    with torch.no_grad():
        for name in ("U", "V", "C", "bias"):
            getattr(net, name).copy_(t[name])
        net.G.copy_(t["G"][None])
    x0 = t["x0"].requires_grad_()
    found = results(net(x0), x0=x0, U=net.U, V=net.V, C=net.C, bias=net.bias)
    return found | {"gradient of sum(output**2) w.r.t. G": net.G.grad[0]}


def two_first_layers(case):
    t, net = case.tensors, CrossNetV1(4, num_layers=2).double()
    with torch.no_grad():
        for place, layer in enumerate(net.layers):
            layer.weight.copy_(t[f"w{place}"]), layer.bias.copy_(t[f"b{place}"])
    x0, layer = t["x0"].requires_grad_(), net.layers[0]
    return results(net(x0), x0=x0, w0=layer.weight, b0=layer.bias)


RECOMPUTE = {
    "three full cross layers": three_full_layers,
    "one low-rank layer, diag_scale, tanh preactivation, one row": one_low_rank_layer,
    "mixture of low-rank experts, tanh, softmax gate": mixture,
    "two layers of the first DCN, for contrast": two_first_layers,
}


@pytest.mark.parametrize("case", [*load_reference("dcn_v2")], ids=lambda c: c.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
