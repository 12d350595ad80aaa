"""Scalable neural network kernels: features and their variance, draws, layers, bundles, adapter."""

from itertools import pairwise
from math import log, pi, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from draws import normal, seeded, unit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.kernels.random_features import ReLUFeatures, cos_variance
from shuffle_nb.kernels.snnk import (
    GAUSS,
    FourierPair,
    FullyBundled,
    SNNKAdapter,
    SNNKLinear,
    UniversalRandomFeatures,
    arccos1_kernel,
    bundle,
    bundle_network,
    count_trainable,
    gaussian_features,
    orthogonal_gaussian,
    relu_features,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)
KINDS = ("relu", "cos", "sin")


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def relu_estimate(x, w, G):
    return relu_features(x, G) @ relu_features(w, G).mT


# ---------------------------------------------------------------- orthogonal draws


def relu_bias(draw, d: int = 64, m: int = 1024, trials: int = 60) -> float:
    """The error of the mean ReLU estimate, in units of what chance allows."""
    x, w = unit(50, d, seed=1).float(), normal(50, d, seed=2).float() / sqrt(d)
    limit = arccos1_kernel(x, w)
    errors = torch.stack([relu_estimate(x, w, draw(m, d, s)) - limit for s in range(trials)])
    floor = (errors.var(0).mean() / trials).sqrt()
    return (rms(errors.mean(0)) / floor).item()


def test_orthogonal_draws_are_unbiased_and_would_not_be_without_the_sign_step():
    def unsigned(m, d, seed):
        q = torch.linalg.qr(torch.randn(m // d, d, d, generator=seeded(seed))).Q
        lengths = torch.randn(m, d, generator=seeded(seed + 1000)).norm(dim=1, keepdim=True)
        return q.mT.reshape(m, d) * lengths

    assert relu_bias(lambda m, d, seed: orthogonal_gaussian(m, d, generator=seeded(seed))) < 1.5
    assert relu_bias(unsigned) > 1.5


@pytest.mark.parametrize("m", [256, 4096])
def test_orthogonal_draws_have_a_smaller_error(m):
    x, w = unit(50, 64, seed=1).float(), normal(50, 64, seed=2).float() / 8
    b, limit = normal(50, seed=3).float(), arccos1_kernel(x, w)
    error = {}
    for orthogonal in (True, False):
        layers = [
            UniversalRandomFeatures(64, m, orthogonal=orthogonal, generator=seeded(s))
            for s in range(12)
        ]
        waves = torch.stack([one.estimate(x, w, b) - one.kernel(x, w, b) for one in layers])
        relus = torch.stack([relu_estimate(x, w, one.projection) - limit for one in layers])
        error[orthogonal] = np.array([rms(waves), rms(relus)])
    assert (error[True] < 0.9 * error[False]).all()


# ---------------------------------------------------------------- universal random features


ACTIVATIONS = {
    "cos": torch.cos,
    "sin": torch.sin,
    "gauss": lambda z: torch.exp(-z.square() / 2),
}


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("options", [{}, {"M": 0.01}, {"balance": 1.3}])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_estimate_is_unbiased(activation, options, orthogonal):
    x, w, b = 0.6 * unit(3, 6, seed=1), 0.7 * unit(4, 6, seed=2), normal(4, seed=3)
    layers = [
        UniversalRandomFeatures(
            6, 2000, activation, orthogonal=orthogonal, generator=seeded(s), **options
        ).double()
        for s in range(60)
    ]
    exact = ACTIVATIONS[activation](x @ w.T + b)
    assert torch.allclose(layers[0].kernel(x, w, b), exact)
    estimates = torch.stack([layer.estimate(x, w, b) for layer in layers])
    error = (estimates.mean(0) - exact).abs() / (estimates.std(0) / sqrt(60))
    assert error.max() < 4


@SMALL
@given(SEEDS, st.floats(0, 0.1), st.floats(0.5, 2), st.sampled_from(["cos", "sin"]))
def test_cosine_features_are_the_real_formula(seed, M, s, activation):
    maps = UniversalRandomFeatures(
        5, 4, activation, M=M, balance=s, generator=seeded(seed)
    ).double()
    g = maps.projection / (s * sqrt(1 + 4 * M))
    x, w, b = normal(2, 3, 5, seed=seed), normal(6, 5, seed=seed + 1), normal(6, seed=seed + 2)
    phi = gaussian_features(1j * s * x, g, M=M) / 2
    assert torch.allclose(maps.phi(x), torch.cat([phi.real, phi.imag], -1), rtol=1e-5, atol=1e-6)
    wave = torch.exp(1j * b)[:, None] * (1 if activation == "cos" else -1j)
    psi = gaussian_features(w / s, g, M=M) / 2 * wave
    assert torch.allclose(
        maps.psi(w, b), torch.cat([psi.real, -psi.imag], -1), rtol=1e-5, atol=1e-6
    )
    assert torch.allclose(maps.psi(w), maps.psi(w, torch.zeros(6).double()))


@SMALL
@given(SEEDS, st.floats(0, 0.1), st.floats(0.5, 2))
def test_complex_features_are_the_formula(seed, M, s):
    pair = FourierPair(GAUSS.activation, GAUSS.sample, 0.5 - 0.5j)
    maps = UniversalRandomFeatures(5, 4, pair, M=M, balance=s, generator=seeded(seed)).double()
    t = maps.frequency
    g = maps.projection / (s * sqrt(1 + 4 * M) * t.sign() * t.abs().sqrt())[:, None]
    x, w, b = normal(3, 5, seed=seed), normal(6, 5, seed=seed + 1), normal(6, seed=seed + 2)
    for k in range(4):
        rho, eta = 1j * s * t[k].sign() * t[k].abs().sqrt(), t[k].abs().sqrt() / s
        phi = gaussian_features(rho * x, g[k : k + 1], M=M)[:, 0] / 2
        psi = (
            pair.const
            * torch.exp(1j * t[k] * b)
            * gaussian_features(eta * w, g[k : k + 1], M=M)[:, 0]
        )
        assert torch.allclose(maps.phi(x)[:, k], phi, rtol=1e-4, atol=1e-6)
        assert torch.allclose(maps.psi(w, b)[:, k], psi / 2, rtol=1e-4, atol=1e-6)
    by_formula = (maps.phi(x) @ maps.psi(w, b).T).real
    assert torch.allclose(maps.estimate(x, w, b), by_formula)


def test_numbers_of_features():
    for activation, expected in (("cos", 14), ("sin", 14), ("gauss", 7), ([GAUSS, GAUSS], 14)):
        maps = UniversalRandomFeatures(3, 7, activation)
        assert maps.out_features == expected
        assert maps.phi(torch.zeros(2, 5, 3)).shape == (2, 5, expected)
        assert maps.psi(torch.zeros(4, 3)).shape == (4, expected)
        assert not list(maps.parameters())


def test_terms_of_an_activation_add_up():
    narrow = FourierPair(
        lambda z: -torch.exp(-2 * z.square()), lambda count, g: 2 * GAUSS.sample(count, g), -1.0
    )
    x, w = 0.5 * unit(2, 3).float(), 0.5 * unit(2, 3, seed=1).float()
    maps = UniversalRandomFeatures(3, 400_000, [GAUSS, narrow], generator=seeded())
    z = x @ w.T
    exact = torch.exp(-z.square() / 2) - torch.exp(-2 * z.square())
    assert torch.allclose(maps.kernel(x, w), exact)
    assert torch.allclose(maps.estimate(x, w), exact, atol=0.03)


def test_balanced_frequencies_tame_the_bell():
    x, w, b = unit(40, 64, seed=1).float(), unit(40, 64, seed=2).float(), normal(40, seed=3).float()
    errors = []
    for s in range(5):
        maps = UniversalRandomFeatures(64, 4096, "gauss", generator=seeded(s))
        errors.append(maps.estimate(x, w, b) - maps.kernel(x, w, b))
    assert rms(torch.stack(errors)) < 0.06


# ---------------------------------------------------------------- the variance


@pytest.mark.parametrize(("length", "s"), [(1, 1), (1, sqrt(0.5)), (1.4, 1), (1.4, sqrt(1.4))])
def test_variance_of_one_draw(length, s):
    x, w, b = unit(4, 8, seed=1), length * unit(3, 8, seed=2), normal(3, seed=3)
    m = 1_000_000
    maps = UniversalRandomFeatures(8, m, balance=s, generator=seeded(4)).double()
    for i, j in ((0, 0), (1, 1), (2, 2), (3, 0)):
        terms = m * maps.phi(x[i]) * maps.psi(w[j : j + 1], b[j : j + 1])[0]
        products = terms[:m] + terms[m:]
        expected = cos_variance(x[i], w[j : j + 1], b[j : j + 1], balance=s)
        assert products.var() == pytest.approx(expected.item(), rel=0.05)


def test_variance_is_the_formula_without_damping_and_holds_with_it():
    x, w, b = unit(8, seed=1), unit(1, 8, seed=2), normal(1, seed=3)
    p, s = (w @ x).item(), 1.2
    by_hand = (
        np.exp(s**2 + 1 / s**2) + np.exp(1 / s**2 - s**2) * np.cos(4 * p + 2 * b.item())
    ) / 2 - np.cos(p + b.item()) ** 2
    assert cos_variance(x, w, b, balance=s).item() == pytest.approx(by_hand, rel=1e-10)
    for M, activation, shift in ((0.05, "cos", 0), (0.05, "sin", pi / 2)):
        maps = UniversalRandomFeatures(8, 10**6, activation, M=M, generator=seeded(4)).double()
        products = sum((10**6 * maps.phi(x) * maps.psi(w, b)[0]).chunk(2))
        expected = cos_variance(x, w, b - shift, M=M).item()
        assert products.var() == pytest.approx(expected, rel=0.05)


@SMALL
@given(SEEDS, st.floats(0.3, 3), st.floats(0.3, 3))
def test_dominating_term_is_smallest_at_the_balance_of_lengths(seed, a, c):
    x, w = a * unit(1, 6, seed=seed), c * unit(1, 6, seed=seed + 1)
    b = pi / 4 - (x * w).sum(-1) * 2  # cos(4p + 2b) = 0: only the dominating term depends on s
    best = cos_variance(x, w, b, balance=sqrt(c / a))
    assert best == pytest.approx((np.exp(2 * a * c) / 2 - torch.cos(b + (x * w).sum()) ** 2).item())
    for factor in (0.7, 1.4):
        assert cos_variance(x, w, b, balance=factor * sqrt(c / a)) > best


def test_error_falls_as_the_root_of_the_draws():
    x, w = unit(50, 64, seed=1).float(), normal(50, 64, seed=2).float() / 8
    b, counts, errors = normal(50, seed=3).float(), [16, 64, 256, 1024, 4096], []
    for m in counts:
        layers = [UniversalRandomFeatures(64, m, generator=seeded(s)) for s in range(10)]
        errors.append(
            rms(torch.stack([one.estimate(x, w, b) - one.kernel(x, w, b) for one in layers]))
        )
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4
    predicted = (cos_variance(x, w, b).mean() / 1024).sqrt().item()
    assert errors[3] == pytest.approx(predicted, rel=0.15)


# ---------------------------------------------------------------- the ReLU kernel


@SMALL
@given(SEEDS, st.floats(0.1, 10), st.floats(0.1, 10))
def test_limits_of_the_arccos_kernel(seed, a, c):
    x = a * unit(1, 5, seed=seed)
    y = normal(1, 5, seed=seed + 1)
    y = c * F.normalize(y - (y @ x.T) * x / a**2, dim=1)  # at a right angle to x
    assert arccos1_kernel(x, x).item() == pytest.approx(a * a / 2)
    assert arccos1_kernel(x, y).item() == pytest.approx(a * c / (2 * pi))
    assert 0 <= arccos1_kernel(x, -x).item() < 1e-9 * a * a
    assert arccos1_kernel(x, 0 * x).item() == 0


def test_relu_estimate_tends_to_the_closed_form():
    x, w = normal(4, 7, seed=1), normal(5, 7, seed=2)
    limit = arccos1_kernel(x, w)
    for draws in (normal(400_000, 7), orthogonal_gaussian(400_000, 7, generator=seeded()).double()):
        assert torch.allclose(relu_estimate(x, w, draws), limit, rtol=0.02, atol=0.02)


@SMALL
@given(SEEDS, st.floats(0.01, 100))
def test_relu_estimate_is_homogeneous_and_blind_to_the_order_of_draws(seed, factor):
    x, w, G = normal(2, 3, 5, seed=seed), normal(4, 5, seed=seed + 1), normal(9, 5, seed=seed + 2)
    estimate = relu_estimate(x, w, G)
    assert torch.allclose(relu_estimate(factor * x, w, G), factor * estimate, rtol=1e-12, atol=0)
    assert torch.allclose(relu_estimate(x, factor * w, G), factor * estimate, rtol=1e-12, atol=0)
    order = torch.randperm(9, generator=seeded(seed))
    assert torch.allclose(relu_features(x, G[order]), relu_features(x, G)[..., order], rtol=1e-12)
    assert torch.allclose(relu_estimate(x, w, G[order]), estimate, rtol=1e-12, atol=0)


@SMALL
@given(SEEDS, st.sampled_from([0.0, 0.3, -0.5]), st.booleans())
def test_relu_features_are_the_formula(seed, constant, normalize):
    x, G = normal(2, 3, 5, seed=seed), normal(7, 5, seed=seed + 1)
    rows = x / x.norm(dim=-1, keepdim=True) if normalize else x
    expected = torch.maximum(rows @ G.T, torch.tensor(constant)) / sqrt(7)
    found = relu_features(x, G, constant=constant, normalize=normalize)
    assert torch.allclose(found, expected, rtol=1e-12)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_layer_is_psi_of_w0_times_phi(kind, normalize):
    w, b, x = normal(4, 6, seed=1), normal(4, seed=2), normal(2, 3, 6, seed=3)
    options = dict(weight=w, bias=b, normalize=normalize, normalization_constant=0.5)
    layer = SNNKLinear(6, 4, 8, kind=kind, generator=seeded(), **options)
    rows, inputs = (0.5 * F.normalize(z, dim=-1) if normalize else z for z in (w, x))
    maps = layer.feature_map
    if kind == "relu":
        G = sqrt(8) * torch.cat([maps.projection, maps.shift[:, None]], 1)
        inputs = torch.cat([inputs, torch.ones(2, 3, 1)], -1)
        rows = torch.cat([rows, b[:, None]], -1)
        expected = relu_features(inputs, G) @ relu_features(rows, G).T
    else:
        expected = maps.estimate(inputs, rows, b)
    assert layer(x).shape == (2, 3, 4) and layer(x).dtype == torch.float64
    assert torch.allclose(layer(x), expected, rtol=1e-10)
    assert torch.allclose(layer(x), F.linear(layer.features(x), layer.psi))


def test_layer_with_a_constant():
    w, x = normal(4, 6, seed=1), normal(3, 6, seed=3)
    layer = SNNKLinear(6, 4, 8, weight=w, constant=0.3, generator=seeded())
    G = sqrt(8) * layer.feature_map.projection
    expected = relu_features(x, G, constant=0.3) @ relu_features(w, G, constant=0.3).T
    assert torch.allclose(layer(x), expected, rtol=1e-10)


def test_layer_starts_near_the_layer_it_is_made_from():
    linear = nn.Linear(10, 5)
    with torch.no_grad():
        linear.weight.mul_(0.5)
    x = unit(20, 10).float()
    layer = SNNKLinear.from_linear(linear, 20_000, kind="cos", generator=seeded(1))
    assert torch.allclose(layer(x), linear(x).cos(), atol=0.06)
    relu = SNNKLinear.from_linear(linear, 20_000, generator=seeded(1))
    ones = torch.ones(20, 1)
    rows = torch.cat([linear.weight, linear.bias[:, None]], 1)
    assert torch.allclose(relu(x), arccos1_kernel(torch.cat([x, ones], 1), rows), atol=0.03)


@pytest.mark.parametrize(("kind", "expected"), [("relu", 196_608), ("cos", 393_216)])
def test_parameters_of_a_transformer_layer(kind, expected):
    linear = nn.Linear(768, 3072)
    layer = SNNKLinear.from_linear(linear, 64, kind=kind)
    assert count_trainable(layer) == expected
    assert count_trainable(linear) == 2_362_368
    if kind == "relu":
        assert round(count_trainable(linear) / count_trainable(layer), 1) == 12.0
        assert sum(b.numel() for b in layer.buffers()) == 64 * 769


@SMALL
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_flops_follow_the_formula(n, d, m, outputs):
    assume(n > 1)
    layer = SNNKLinear(d, outputs, m)
    assert count_flops(layer, torch.randn(n, d)) == 2 * n * m * (d + outputs)
    assert count_trainable(layer) == outputs * m


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    layer = SNNKLinear(
        4, 3, 5, kind=kind, bias=normal(3), out_bias=True, generator=seeded(1)
    ).double()
    x = normal(2, 4, seed=2).requires_grad_()

    def call(x, psi, out_bias):
        return torch.func.functional_call(layer, {"psi": psi, "out_bias": out_bias}, x)

    assert torch.autograd.gradcheck(call, (x, layer.psi, layer.out_bias))
    for activation in ("cos", "gauss"):
        maps = UniversalRandomFeatures(4, 3, activation, generator=seeded(2)).double()
        w = 0.5 * normal(2, 4, seed=3).requires_grad_()
        assert torch.autograd.gradcheck(maps.estimate, (x, w, normal(2).requires_grad_()))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_carries_the_draws(kind):
    x = torch.randn(3, 6)
    first = SNNKLinear(6, 4, 8, kind=kind, generator=seeded(1))
    other = SNNKLinear(6, 4, 8, kind=kind, generator=seeded(2))
    assert not torch.equal(other(x), first(x))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(x), first(x))
    maps, others = (UniversalRandomFeatures(6, 4, "gauss", generator=seeded(s)) for s in (1, 2))
    others.load_state_dict(maps.state_dict())
    assert torch.equal(others.phi(x), maps.phi(x))
    assert torch.equal(others.psi(x), maps.psi(x))


@pytest.mark.parametrize("generator", [None, seeded(5)], ids=["private", "given"])
def test_global_random_stream_is_left_alone(generator):
    state = torch.get_rng_state()
    x = torch.zeros(2, 6)
    for kind in KINDS:
        SNNKLinear(6, 4, 8, kind=kind, generator=generator)(x)
        FullyBundled([5, 4], 6, 2, kind, generator=generator)(x)
    SNNKAdapter(6, 4, 3, generator=generator)(x)
    SNNKAdapter(6, 4, generator=generator)(x)
    UniversalRandomFeatures(6, 4, "gauss", orthogonal=True, generator=generator).phi(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_without_a_generator_follow_the_seed_but_do_not_repeat_the_weights():
    torch.manual_seed(3)
    w = torch.randn(50, 64) / 8
    maps = UniversalRandomFeatures(64, 50)
    assert (F.cosine_similarity(maps.projection, w).abs() < 0.6).all()
    torch.manual_seed(3)
    assert torch.equal(UniversalRandomFeatures(64, 50).projection, maps.projection)
    torch.manual_seed(4)
    assert not torch.equal(UniversalRandomFeatures(64, 50).projection, maps.projection)


def test_draws_of_the_seed_of_the_weights_destroy_the_estimate():
    w = torch.randn(50, 64, generator=seeded(0)) / 8
    x = unit(50, 64, seed=1).float()
    error = {}
    for seed in (0, 1):
        maps = UniversalRandomFeatures(64, 50, generator=seeded(seed))
        error[seed] = rms(maps.estimate(x, w) - maps.kernel(x, w))
    assert error[0] > 50 * error[1]


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_graph_breaks_and_under_autocast(kind):
    x = unit(3, 5, 6).float()
    layer = SNNKLinear(6, 4, 8, kind=kind, bias=torch.randn(4), normalize=True)
    network = FullyBundled([5, 4], 6, 2, kind)
    nn.init.normal_(network.V, std=0.1)
    adapter = SNNKAdapter(6, 4, 3, kind)
    nn.init.normal_(adapter.up.weight)
    for module in (layer, network, adapter):
        plain = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), plain, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.allclose(module(x).float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("plain_python")
def test_complex_features_compiled_and_under_autocast():
    maps = UniversalRandomFeatures(6, 50, "gauss")
    x, w = 0.5 * unit(5, 6).float(), 0.5 * unit(3, 6, seed=1).float()
    compiled = torch.compile(maps.estimate, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, w), maps.estimate(x, w), atol=1e-5)
    plain = maps.estimate(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(maps.estimate(x, w).float(), plain, atol=0.05)


# ---------------------------------------------------------------- bundling


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
def test_bundle_is_exact(kind, biases):
    x = unit(3, 7, 6)
    snnk = SNNKLinear(6, 9, 8, kind=kind, out_bias=biases[0], bias=normal(9)).double()
    if biases[0]:
        nn.init.normal_(snnk.out_bias)
    linear = nn.Linear(9, 4, bias=biases[1]).double()
    merged = bundle(snnk, linear)
    assert torch.allclose(merged(x), linear(snnk(x)), rtol=1e-10, atol=1e-12)
    assert count_trainable(merged) == 4 * merged.psi.shape[1] + 4 * any(biases)
    assert (merged.out_bias is not None) == any(biases)


def test_bundle_loads_bundles_again_and_shares_no_memory():
    snnk, linear, third = SNNKLinear(6, 9, 8).double(), nn.Linear(9, 4).double(), nn.Linear(4, 2)
    x, merged = unit(5, 6), bundle(snnk, linear)
    fresh = SNNKLinear(6, 4, 8, out_bias=True, generator=seeded(9)).double()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(x), merged(x))
    whole = bundle(merged, third.double())
    assert torch.allclose(whole(x), third(merged(x)), rtol=1e-10)
    before = linear(snnk(x)).detach()
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()
        merged.feature_map.projection.zero_()
    assert torch.equal(linear(snnk(x)), before)


@SMALL
@given(SEEDS, st.sampled_from(KINDS), st.lists(st.integers(2, 12), max_size=3))
def test_closed_form_is_the_optimum(seed, kind, dims_m):
    x, y = unit(30, 6, seed=seed), normal(30, 3, seed=seed + 1)
    network = FullyBundled(dims_m, 6, 3, kind, generator=seeded(seed)).double()
    assert network.fit(x, y, ridge=0.1) is network

    def objective(V, bias):
        residual = network.features(x) @ V.T + bias - y
        return residual.square().sum() + 0.1 * V.square().sum()

    value = objective(network.V, network.bias)
    gradients = torch.autograd.grad(value, [network.V, network.bias])
    assert max(gradient.abs().max() for gradient in gradients) < 1e-8
    for step in range(5):
        moved = network.V + 0.01 * normal(*network.V.shape, seed=seed + step)
        assert objective(moved, network.bias) > value
        assert objective(network.V, network.bias + 0.01 * normal(3, seed=step)) > value


def test_closed_form_is_the_formula_with_a_column_of_ones():
    x, y = unit(30, 6), normal(30, 2, seed=1)
    network = FullyBundled([8], 6, 2, generator=seeded()).double().fit(x, y, ridge=0.2)
    H = torch.cat([network.features(x), torch.ones(30, 1)], 1)
    penalty = 0.2 * torch.eye(9).double()
    penalty[8, 8] = 0
    V = y.T @ H @ torch.linalg.inv(H.T @ H + penalty)
    assert torch.allclose(network.V, V[:, :8]) and torch.allclose(network.bias, V[:, 8])


def test_closed_form_in_single_precision_is_accurate():
    x, y = unit(300, 20).float(), normal(300, 3, seed=1).float()
    single = FullyBundled([200], 20, 3, generator=seeded())
    double = FullyBundled([200], 20, 3, generator=seeded()).double()
    found, exact = single.fit(x, y)(x), double.fit(x.double(), y.double())(x.double())
    assert rms(found - exact) < 1e-3 * rms(exact)


def test_bundled_network_is_the_nested_features():
    network = FullyBundled([8, 5], 6, 2, generator=seeded())
    x = torch.randn(4, 3, 6)
    first, second = (
        sqrt(m) * maps.projection for m, maps in zip((8, 5), network.maps, strict=True)
    )
    nested = relu_features(relu_features(x, first), second)
    assert torch.allclose(network.features(x), nested, atol=1e-6)
    assert network(x).shape == (4, 3, 2) and not network(x).any()


@pytest.mark.parametrize(
    ("widths", "m", "before", "after"),
    [([784, 512, 512, 10], 256, 669_706, 2570), ([64, 128, 128, 10], 256, 26_122, 2570)],
)
def test_parameters_of_bundled_networks(widths, m, before, after):
    layers = nn.Sequential(*[nn.Linear(*pair) for pair in pairwise(widths)])
    assert count_trainable(layers) == before
    bundled = FullyBundled([m] * (len(widths) - 2), widths[0], widths[-1])
    assert count_trainable(bundled) == after


def test_bundled_cosine_network_tends_to_the_network():
    layers = [nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)]
    x = unit(200, 4).float()
    with torch.no_grad():
        exact = layers[2](layers[1](layers[0](x).cos()).cos())
        errors = [
            rms(bundle_network(layers, [m, m], generator=seeded(1))(x) - exact) for m in (20, 800)
        ]
    assert errors[1] < 0.4 * errors[0] and errors[1] < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_network_bundles_layer_by_layer(kind):
    layers = [nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)]
    x = unit(7, 4).float()
    whole = bundle_network(layers, [9, 8], kind, generator=seeded())
    outer, inner = whole.maps
    one = SNNKLinear.from_linear(layers[0], 9, kind=kind, generator=seeded(1))
    one.feature_map.load_state_dict(outer.state_dict())
    with torch.no_grad():
        one.psi.copy_(outer.psi(layers[0].weight, layers[0].bias))
        middle = bundle(one, layers[1])
        V = layers[2].weight @ inner.psi(middle.psi)
        expected = inner.phi(middle.features(x)) @ V.T + layers[2].bias
    assert torch.allclose(whole(x), expected, atol=1e-5)


# ---------------------------------------------------------------- the adapter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bottleneck", [None, 5])
def test_adapter_starts_as_identity_and_learns(kind, bottleneck):
    adapter = SNNKAdapter(12, 7, bottleneck, kind, generator=seeded())
    x = torch.randn(2, 3, 12)
    assert torch.equal(adapter(x), x)
    adapter(x).square().sum().backward()
    up = adapter.up if bottleneck is None else adapter.up.weight
    assert up.grad.abs().sum() > 0
    features = 7 if kind == "relu" else 14
    expected = 12 * features + 12 if bottleneck is None else 5 * features + 5 * 12 + 12
    assert count_trainable(adapter) == expected
    with torch.no_grad():
        up.fill_(0.1)
    down = adapter.down(x)
    moved = 0.1 * down if bottleneck is None else 0.1 * down.sum(-1, keepdim=True)
    assert torch.allclose(adapter(x), x + moved, atol=1e-5)


@pytest.mark.parametrize("bottleneck", [None, 40])
def test_adapter_may_start_small_and_with_norms_as_in_bert(bottleneck):
    options = dict(init="bert", norm_before=True, norm_after=True)
    adapter = SNNKAdapter(60, 30, bottleneck, generator=seeded(), **options)
    up = adapter.up if bottleneck is None else adapter.up.weight
    assert up.std().item() == pytest.approx(0.02, rel=0.25)
    w = 0.02 * torch.randn(bottleneck or 60, 60, generator=seeded())
    assert torch.allclose(adapter.down.psi, adapter.down.feature_map.psi(w))
    x = 3 * torch.randn(2, 4, 60) + 1
    inner = F.layer_norm(x, (60,))
    down = adapter.down(inner)
    moved = up * down if bottleneck is None else down @ up.T
    assert torch.allclose(adapter(x), F.layer_norm(x + moved, (60,)), atol=1e-5)
    plain = SNNKAdapter(60, 30, bottleneck, generator=seeded())
    assert count_trainable(adapter) == count_trainable(plain) + 4 * 60
    again = SNNKAdapter(60, 30, bottleneck, **options)
    again.load_state_dict(adapter.state_dict())
    assert torch.equal(again(x), adapter(x))


def test_weights_start_as_those_of_a_linear_layer():
    layer = SNNKLinear(100, 400, 8, generator=seeded(7))
    w = torch.empty(400, 100).uniform_(-0.1, 0.1, generator=seeded(7))
    assert torch.allclose(layer.psi, layer.feature_map.psi(w))
    assert w.std() == pytest.approx(nn.Linear(100, 400).weight.std().item(), rel=0.05)


def test_count_trainable_leaves_out_what_is_frozen():
    model = nn.Sequential(nn.Linear(3, 2), SNNKLinear(2, 4, 5))
    model[0].requires_grad_(False)
    assert count_trainable(model) == 20


# ---------------------------------------------------------------- bad input


X = torch.zeros(2, 3)


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: UniversalRandomFeatures(3, 4, M=-1.0), "M must be >= 0"),
            (
                lambda: UniversalRandomFeatures(3, 4, balance=0.0),
                "balance must be positive and finite, got 0",
            ),
            (lambda: UniversalRandomFeatures(3, 0), "num_features must be at least 1"),
            (lambda: UniversalRandomFeatures(0, 3), "dim must be at least 1"),
            (
                lambda: UniversalRandomFeatures(3, 4, "tanh"),
                "'cos', 'sin', 'gauss', a Four.*'tanh'",
            ),
            (lambda: UniversalRandomFeatures(3, 4, []), "'cos', 'sin', 'gauss'"),
            (lambda: UniversalRandomFeatures(4, 4).phi(X), r"x must be \(\.\.\., 4\), got shape"),
            (lambda: UniversalRandomFeatures(4, 4).psi(X), r"w must be \(\.\.\., 4\), got shape"),
            (lambda: cos_variance(X, X, M=-1.0), "M must be >= 0"),
            (lambda: relu_features(X, torch.zeros(5, 4)), r"x must be \(\.\.\., 4\), got shape"),
            (lambda: arccos1_kernel(X, torch.zeros(5, 4)), r"x must be \(\.\.\., 4\), got shape"),
            (lambda: ReLUFeatures(3, 4).psi(X, torch.zeros(2)), "b must be None"),
            (lambda: SNNKLinear(3, 4, 0), "num_features must be at least 1, got 0"),
            (lambda: SNNKLinear(3, 4, 5, kind="tanh"), "kind must be one of .*got 'tanh'"),
            (
                lambda: SNNKLinear(3, 4, 5, kind="cos", constant=0.1),
                "constant belongs to kind='relu'",
            ),
            (
                lambda: SNNKLinear(3, 4, 5, weight=X),
                r"weight must be \(4, 3\), got shape \(2, 3\)",
            ),
            (
                lambda: SNNKLinear(3, 4, 5, bias=torch.zeros(3)),
                r"bias must be \(4\), got shape \(3,\)",
            ),
            (
                lambda: SNNKLinear(4, 4, 5)(X),
                r"expected last dim in_features=4, got \(2, 3\)",
            ),
            (
                lambda: bundle(SNNKLinear(3, 4, 5), nn.Linear(3, 2)),
                r"linear.weight must be \(outputs, 4\), got shape \(2, 3\)",
            ),
            (lambda: FullyBundled([0], 3, 2), "num_features must be at least 1"),
            (lambda: FullyBundled([4], 3, 2, "tanh"), "kind must be one of"),
            (
                lambda: FullyBundled([4], 3, 2).fit(X, X[:, :2], 0.0),
                "ridge must be positive and finite, got 0",
            ),
            (
                lambda: FullyBundled([4], 3, 2).fit(X, X),
                r"Y must be \(2, 2\), got shape \(2, 3\)",
            ),
            (lambda: FullyBundled([4], 5, 2)(X), r"x must be \(\.\.\., 5\), got shape"),
            (lambda: bundle_network([nn.Linear(3, 4)], [5]), "one more than dims_m, got 1, 1"),
            (
                lambda: bundle_network([nn.Linear(3, 4), nn.Linear(5, 2)], [5]),
                r"next layer's weight must be \(outputs, 4\), got shape \(2, 5\)",
            ),
            (lambda: SNNKAdapter(3, 4, 0), "bottleneck must be at least 1"),
            (lambda: SNNKAdapter(3, 4, 2, init="x"), "init must be .*'mam'.*'bert'.*got 'x'"),
            (lambda: SNNKAdapter(5, 4, 2)(X), "expected last dim in_features=5"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


def test_damping_lowers_the_variance_a_little_and_then_raises_it():
    x, w = unit(1, 64, seed=1), unit(1, 64, seed=2)
    small, none, large = (cos_variance(x, w, M=M).item() for M in (0.008, 0.0, 0.05))
    assert small < none < large
    assert log(none / small) < 0.1


# ---------------------------------------------------------------- what users met


@pytest.mark.parametrize(
    ("rows", "message"), [(0, "rows of X must be at least 1, got 0"), (4, "X must be finite")]
)
def test_a_fit_refuses_no_rows_and_what_is_no_number(rows, message):
    X = torch.full((rows, 6), torch.nan)
    with pytest.raises(ValueError, match=message):
        FullyBundled([8], 6, 2).fit(X, torch.zeros(rows, 2))


def test_frozen_maps_follow_the_device_context():
    with torch.device("meta"):
        layer, network = SNNKLinear(6, 4, 16), FullyBundled([8, 5], 6, 2, "cos")
    tensors = [*layer.state_dict().values(), *network.state_dict().values()]
    assert {t.device.type for t in tensors} == {"meta"}


def test_inputs_that_overflow_are_refused():
    layer = SNNKLinear(64, 4, 16, kind="cos")
    assert layer(torch.ones(2, 64)).isfinite().all()
    with pytest.raises(ValueError, match="at length 80 exp"):
        layer(10 * torch.ones(2, 64))


# ---------------------------------------------------------------- the authors' own numbers


def layer_with(case, **options):
    W0, G = case.tensors["W0"], case.tensors["G"]
    layer = SNNKLinear(W0.shape[1], W0.shape[0], len(G), weight=W0, **options)
    with torch.no_grad():
        layer.feature_map.projection.copy_(G / len(G) ** 0.5)
        layer.psi.copy_(layer.feature_map.psi(layer._scaled(W0)))
    return layer


def relu_layer(case):
    options = {k: case.settings[k] for k in ("constant", "normalize", "normalization_constant")}
    layer, x = layer_with(case, **options), case.tensors["x"].requires_grad_()
    start, output = layer.psi.detach().clone(), layer(x)
    output.square().sum().backward()
    results = {
        "psi at the start": start,
        "output": output,
        "gradient w.r.t. psi": layer.psi.grad,
        "gradient w.r.t. x": x.grad,
    }
    with torch.no_grad():
        layer.psi -= case.settings["lr"] * layer.psi.grad
    G = case.tensors["G"]
    left, right = (relu_features(case.tensors[name], G) for name in ("x3", "W0"))
    return results | {"output after one step": layer(x), "kernel estimate on x3": left @ right.mT}


def bundles(case):
    W2, b2 = case.tensors["W2"], case.tensors["b2"]
    linear = torch.nn.Linear(W2.shape[1], W2.shape[0]).double()
    with torch.no_grad():
        linear.weight.copy_(W2), linear.bias.copy_(b2)
    network = FullyBundled([len(case.tensors["G"])], 3, 2).double()
    projections = [b for name, b in network.named_buffers() if name.endswith("projection")]
    projections[0].copy_(case.tensors["G"] / len(case.tensors["G"]) ** 0.5)
    x = case.tensors["x"]
    network.fit(x, case.tensors["targets"], ridge=case.settings["ridge"])
    return {
        "output of the bundled layer": bundle(layer_with(case), linear)(x),
        "V": network.V,
        "bias": network.bias,
        "output of the fitted network": network(x),
    }


def waves(case):
    s, x = case.settings, case.tensors["x"].requires_grad_()
    w, b, g = (case.tensors[name] for name in ("w", "b", "g"))
    results = {}
    for name in ("cos", "sin"):
        maps = UniversalRandomFeatures(4, s["m"], name, M=s["M"], balance=s["balance"]).double()
        stretch = s["balance"] * (1 + 4 * s["M"]) ** 0.5
        maps.projection.copy_(stretch * g)
        maps.log_weight.copy_(log(1 + 4 * s["M"]) - log(s["m"]) / 2 - s["M"] * g.square().sum(1))
        results[f"estimate of {name}"] = maps.estimate(x, w, b)
    (gradient,) = torch.autograd.grad(results["estimate of cos"].square().sum(), x)
    return results | {"gradient of sum(cos estimate**2) w.r.t. x": gradient}


def gaussian(case):
    x, w, b, g, t = (case.tensors[name] for name in ("x", "w", "b", "g", "t"))
    given = FourierPair(GAUSS.activation, lambda count, generator: t / (2 * pi))
    maps = UniversalRandomFeatures(3, case.settings["m"], [given]).double()
    maps.frequency.copy_(t)
    maps.projection.copy_((t.sign() * t.abs().sqrt())[:, None] * g)
    maps.log_weight.fill_(-log(case.settings["m"]) / 2)
    product = maps.phi(x) @ maps.psi(w, b).mT
    return {"estimate": maps.estimate(x, w, b), "imaginary part": product.imag}


RECOMPUTE = {
    "ReLU kernel, normalised to length 1.7, kappa 0.1, one step of SGD": relu_layer,
    "bundle and closed form": bundles,
    "cos and sin with bias, balance 1.3, M = 0.02": waves,
    "Gaussian activation with given frequencies": gaussian,
}


@pytest.mark.parametrize("case", [*load_reference("snnk")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
