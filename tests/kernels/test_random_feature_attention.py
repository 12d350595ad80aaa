"""Random-feature attention: features, kernels, ridge, targets."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.foundations.costs import count_flops, count_parameters
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.kernels.random_feature_attention import (
    RandomFeatureAttention,
    RandomFeatureMLP,
    arccos1,
    augment,
    biased_mean,
    rfa_kernel,
    rfmlp_kernel,
    solve_ridge,
    sphere_sequences,
    target,
)

SMALL = settings(deadline=None, max_examples=20)
SEEDS = st.integers(0, 2**32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sequences(n, keys, d, seed=0):
    return sphere_sequences(n, keys, d, generator(seed), torch.float64)


def attention(d=3, heads=5, seed=0, **options):
    options = {"dtype": torch.float64} | options
    return RandomFeatureAttention(d, heads, generator=generator(seed), **options)


def by_loops(W, x):
    """Three loops and nothing else."""
    tokens = augment(x)
    n, N = len(x), x.shape[1] - 1
    found = torch.zeros(n, *W.shape[:2], dtype=x.dtype)
    for t in range(n):
        for m in range(len(W)):
            for i in range(1, N + 1):
                score = tokens[t, 0] @ W[m] @ tokens[t, i]
                found[t, m] += score.clamp(min=0) * tokens[t, i] / N
    return found.flatten(1)


# ---------------------------------------------------------------- features


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_features_are_the_loops(seed, d, keys, heads):
    layer, x = attention(d, heads, seed), torch.randn(3, keys + 1, d).double()
    assert (layer.features(x) - by_loops(layer.W, x)).abs().max() < 1e-10


@SMALL
@given(SEEDS, st.integers(1, 6))
def test_the_order_of_keys_and_their_copies_do_not_matter(seed, keys):
    layer, x = attention(), sequences(4, keys, 3, seed)
    order = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(keys)])
    features = layer.features(x)
    assert torch.allclose(layer.features(x[:, order]), features, atol=1e-12)
    doubled = torch.cat([x, x[:, 1:]], 1)
    assert torch.allclose(layer.features(doubled), features, atol=1e-12)
    if keys > 1:
        mlp = RandomFeatureMLP(3, keys + 1, 20, generator(), torch.float64)
        assert not torch.allclose(mlp.features(x.flip(1)), mlp.features(x))


def test_scaling_w_scales_features_and_heads_are_concatenated():
    first, second, x = attention(heads=2), attention(heads=4, seed=1), sequences(5, 3, 3)
    both = attention(heads=6)
    both.W.copy_(torch.cat([first.W, second.W]))
    pieces = [first.features(x), second.features(x)]
    assert torch.allclose(both.features(x), torch.cat(pieces, 1), atol=1e-14)
    first.W.mul_(3)
    assert torch.allclose(first.features(x), 3 * pieces[0], atol=1e-12)


def test_pieces_of_the_batch_change_nothing():
    layer, x = attention(heads=7), sequences(23, 4, 3)
    whole = layer.features(x)
    layer.chunk = 200
    assert torch.allclose(layer.features(x), whole, atol=1e-14)
    assert layer.features(x[:0]).shape == (0, 28)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.allclose(layer.features(strided), whole, atol=1e-14)
    assert torch.allclose(layer.features(x[4:5]), whole[4:5], atol=1e-14)


def test_weights_are_the_scores_cut_and_divided():
    layer, x = attention(), sequences(2, 4, 3)
    weights = layer.weights(x)
    assert weights.shape == (2, 5, 4) and (weights >= 0).all()
    score = augment(x)[1, 0] @ layer.W[2] @ augment(x)[1, 3]
    assert torch.allclose(weights[1, 2, 2], score.clamp(min=0) / 4)


def test_laws_of_the_scores():
    x = sequences(1, 1, 4)
    tokens = augment(x)[0]
    for layer, mean, variance in (
        (RandomFeatureAttention.zero_mean(4, 100_000, generator=generator()), 0, 1),
        (RandomFeatureAttention.biased(4, 100_000, generator=generator()), x[0, 0] @ x[0, 1], 0.25),
    ):
        scores = tokens[0] @ layer.W.double() @ tokens[1]
        assert abs(scores.mean() - mean) < 0.01
        assert abs(scores.var() / variance - 1) < 0.02


def test_parameters_and_products():
    layer, x = attention(4, 6, dtype=torch.float32), torch.randn(3, 8, 4)
    D, N, M = 5, 7, 6
    assert count_parameters(layer).trainable == M * D
    assert count_flops(layer.features, x) == 3 * 2 * M * (D * D + N * D + N * D)
    mlp = RandomFeatureMLP(4, 8, 30)
    assert count_parameters(mlp).trainable == 30 and mlp.W.shape == (30, 33)


def test_gradients_of_the_output():
    layer, x = attention(heads=3), sequences(2, 3, 3, seed=5).requires_grad_()
    V = torch.randn(3, 4).double().requires_grad_()

    def output(V, x):
        return torch.func.functional_call(layer, {"V": V}, (x,))

    assert torch.autograd.gradcheck(output, (V, x))
    assert not layer.W.requires_grad


def test_the_same_generator_draws_the_same_and_state_is_restored():
    first, second, other = attention(seed=3), attention(seed=3), attention(seed=4)
    assert torch.equal(first.W, second.W) and not torch.equal(first.W, other.W)
    other.load_state_dict(first.state_dict())
    assert torch.equal(other.W, first.W)
    assert torch.equal(copy.deepcopy(first).W, first.W)
    assert not first.V.any() and not first(sequences(2, 2, 3)).any()


def test_one_graph_autocast_and_half(plain_python):
    x = sequences(6, 4, 3).float()
    layer = attention(dtype=torch.float32)
    layer.V.data.normal_(generator=generator())
    plain = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), plain, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(layer(x).float(), plain, atol=0.1)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), plain, atol=0.2)


def test_nan_stays_in_its_sequence():
    x = sequences(3, 4, 3)
    x[1, 2, 0] = math.nan
    features = attention().features(x)
    assert features[1].isnan().any() and not features[[0, 2]].isnan().any()


# ---------------------------------------------------------------- kernels


def test_arc_cosine_values():
    r = torch.tensor([1.0, 0.0, -1.0, 1.1], dtype=torch.float64)
    expected = torch.tensor([0.5, 1 / (2 * math.pi), 0, 0.5], dtype=torch.float64)
    assert torch.allclose(arccos1(r), expected, atol=1e-12)


def test_kernel_of_one_key_with_itself_is_one_and_none_is_negative_definite():
    x = sequences(6, 1, 3)
    assert torch.allclose(rfa_kernel(x, x).diagonal(), torch.ones(6).double())
    x = torch.randn(20, 4, 3).double()
    for kernel in (rfa_kernel, rfmlp_kernel):
        assert torch.linalg.eigvalsh(kernel(x, x)).min() > -1e-9
    assert torch.allclose(rfa_kernel(x, x[:, :3]), rfa_kernel(x[:, :3], x).T)


def test_features_converge_to_the_kernels_with_the_root_of_their_number():
    x = torch.randn(2, 4, 3, generator=generator(2)).double()
    exact, counts = rfa_kernel(x, x), (100, 400, 1600, 6400)
    apart = []
    for heads in counts:
        draws = [attention(3, heads, seed).features(x) for seed in range(12)]
        apart.append(torch.stack([(f @ f.T / heads - exact).norm() for f in draws]).mean())
    slope = (apart[-1] / apart[0]).log() / math.log(counts[-1] / counts[0])
    assert -0.65 < slope < -0.4
    features = RandomFeatureMLP(3, 4, 200_000, generator(), torch.float64).features(x)
    near = features @ features.T / 200_000
    assert torch.allclose(near, rfmlp_kernel(x, x), rtol=0.03)


def test_kernel_in_pieces():
    x = sequences(40, 15, 3)
    assert torch.allclose(rfa_kernel(x, x)[7:8, 9], rfa_kernel(x[7:8], x[9:10])[:, 0])
    assert rfa_kernel(x[:1], x[:0]).shape == (1, 0)


# ---------------------------------------------------------------- ridge


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("shape", [(7,), (7, 2)])
def test_both_forms_of_ridge_are_the_plain_solution(ridge, shape):
    x, y = sequences(7, 3, 3), torch.randn(*shape).double()
    for heads in (1, 4):  # fewer and more parameters than samples
        layer = attention(heads=heads).fit(x, y, ridge)
        F = layer.features(x)
        plain = torch.linalg.solve(F.T @ F + 7 * ridge * torch.eye(F.shape[1]).double(), F.T @ y)
        assert torch.allclose(layer.V.flatten(0, 1), plain, atol=1e-8)
        assert layer(x).shape == shape


def test_no_penalty_interpolates_and_a_large_one_gives_zero():
    x, y = sequences(6, 3, 3), torch.randn(6).double()
    layer = attention(heads=20).fit(x, y, 0)
    assert torch.allclose(layer(x), y, atol=1e-9)
    assert attention(heads=20).fit(x, y, 1e9).V.abs().max() < 1e-8


def test_no_penalty_and_equal_samples_give_the_smallest_solution():
    x = sequences(4, 3, 3).repeat(2, 1, 1)
    y = torch.randn(8).double()
    layer = attention(heads=20).fit(x, y, 0)
    assert torch.allclose(layer(x), (y + y.roll(4)) / 2, atol=1e-8)
    F = layer.features(x)
    assert torch.allclose(layer.V.flatten(), torch.linalg.pinv(F, rtol=1e-9) @ y, atol=1e-8)


def test_path_returns_all_errors_and_keeps_the_best():
    x, val = sequences(9, 3, 3), sequences(5, 3, 3, seed=1)
    y, y_val = torch.randn(9).double(), torch.randn(5).double()
    ridges = [1e-4, 1e-2, 1.0]
    layer = attention(heads=10)
    mse, best = layer.ridge_path(x, y, val, y_val, ridges)
    alone = [(attention(heads=10).fit(x, y, r)(val) - y_val).square().mean() for r in ridges]
    assert torch.allclose(mse, torch.stack(alone), atol=1e-10)
    assert best == ridges[int(mse.argmin())]
    assert torch.allclose((layer(val) - y_val).square().mean(), mse.min())


def test_fitting_in_float32_is_solved_in_float64():
    x, y = sequences(8, 3, 3), torch.randn(8).double()
    double = attention(heads=10).fit(x, y, 1e-6)
    single = attention(heads=10)
    single.W.data = double.W
    single = single.float().fit(x.float(), y.float(), 1e-6)
    assert single.V.dtype == torch.float32
    assert torch.allclose(single(x.float()).double(), double(x), atol=1e-2)


def test_solve_ridge_solves():
    A = torch.randn(5, 5).double()
    gram, y = A @ A.T, torch.randn(5, 2).double()
    shifts = torch.tensor([0.0, 0.1]).double()
    found = solve_ridge(gram, y, shifts)
    for shift, one in zip(shifts, found, strict=True):
        assert torch.allclose((gram + shift * torch.eye(5)) @ one, y, atol=1e-6)


def test_average_is_learned_by_attention_and_not_by_the_network():
    g = generator()
    label = target("average", 4, generator=g)
    x = sphere_sequences(500, 16, 4, g, torch.float64)
    y = (label(x) - label(x).mean()) / label(x).std()
    layer = RandomFeatureAttention.zero_mean(4, 100, generator=g, dtype=torch.float64)
    mlp = RandomFeatureMLP(4, 17, 500, g, torch.float64)
    ridges = [10.0**power for power in range(-8, 2)]
    errors = [
        model.ridge_path(x[:300], y[:300], x[300:], y[300:], ridges)[0].min()
        for model in (layer, mlp)
    ]
    assert errors[0] < 0.1 and errors[1] > 0.8


# ---------------------------------------------------------------- data


def test_tokens_lie_on_the_sphere():
    x = sphere_sequences(50, 4, 3, generator())
    assert x.shape == (50, 5, 3) and torch.allclose(x.norm(dim=-1), torch.ones(50, 5))
    assert x.mean() < 0.1


def test_targets_are_means_over_keys():
    x = sequences(4, 5, 3)
    beta = torch.randn(3, generator=generator(7), dtype=torch.float64)
    beta = beta / beta.norm()
    along, match = x[:, 1:] @ beta, (x[:, :1] * x[:, 1:]).sum(-1)
    for name, expected in {
        "average": along**3,
        "correlation": match**3 * along,
        "matrix": match**3,
    }.items():
        label = target(name, 3, p=3, generator=generator(7))
        assert torch.allclose(label(x), expected.mean(1))
    signs = target("matrix", 3, p=1, gamma=1.0, generator=generator(7))
    unit = torch.eye(3).double()
    entries = [signs(torch.stack([a, b])[None]) for a in unit for b in unit]
    assert torch.allclose(torch.cat(entries).abs(), torch.ones(9).double())


def test_targets_leave_the_stream_at_the_same_place():
    after = []
    for name in ("average", "correlation", "matrix"):
        g = generator()
        target(name, 3, generator=g)
        after.append(torch.rand(1, generator=g))
    assert after[0] == after[1] == after[2]


# ---------------------------------------------------------------- the independent numbers


def with_weights(layer, **weights):
    with torch.no_grad():
        for name, value in weights.items():
            getattr(layer, name).copy_(value)
    return layer


def of_features(case):
    x = case.tensors["x"].requires_grad_()
    layer = with_weights(attention(4, 3), W=case.tensors["W"], V=case.tensors["V"])
    output = layer(x)
    output.square().sum().backward()
    return {
        "features": layer.features(x),
        "output": output,
        "gradient of sum(output**2) w.r.t. V": layer.V.grad,
        "gradient of sum(output**2) w.r.t. x": x.grad,
    }


def of_kernels(case):
    r, x, z = (case.tensors[name] for name in "rxz")
    unit_x, unit_z = (t / t.norm(dim=-1, keepdim=True) for t in (x, z))
    return {
        "arccos1(r)": arccos1(r),
        "rfa_kernel(x, z)": rfa_kernel(x, z),
        "rfa_kernel(x, x)": rfa_kernel(x, x),
        "rfmlp_kernel(unit x, unit z)": rfmlp_kernel(unit_x, unit_z),
        "rfa_kernel(unit x, unit z)": rfa_kernel(unit_x, unit_z),
    }


def of_ridge(case):
    x, y, found = case.tensors["x"], case.tensors["y"], {}
    for ridge in case.settings["ridges"]:
        layer = with_weights(attention(3, 4), W=case.tensors["W"]).fit(x, y, ridge)
        penalty = ridge * layer.V.square().sum()
        loss = (layer(x) - y).square().sum() / len(x) + penalty
        found[f"V, ridge {ridge}"] = layer.V
        found[f"test output, ridge {ridge}"] = layer(case.tensors["x_test"])
        found[f"penalised training loss, ridge {ridge}"] = loss.reshape(1)
    return found


def of_mlp(case):
    x = case.tensors["x"]
    mlp = with_weights(RandomFeatureMLP(3, 3, 5, dtype=torch.float64), W=case.tensors["W"])
    mlp.fit(x, case.tensors["y"], case.settings["ridge"])
    noise = case.tensors["noise"]
    biased = with_weights(attention(3, 2), W=biased_mean(3) + 0.25 * noise)
    return {
        "features": mlp.features(x),
        "V": mlp.V,
        "output": mlp(x),
        "biased_mean(3)": biased_mean(3),
        "biased features": biased.features(x),
    }


CASES = {
    "features, output and gradients, tokens of general norm": of_features,
    "closed-form kernels": of_kernels,
    "ridge with more parameters than samples, two targets": of_ridge,
    "random-feature MLP and biased attention, fewer parameters than samples": of_mlp,
}


@pytest.mark.parametrize("name", CASES)
def test_against_an_independent_oracle(name, agree):
    case = load_reference("random_feature_attention")[name]
    agree(case, CASES[name](case))


def test_every_case_is_compared():
    assert {case.name for case in load_reference("random_feature_attention")} == set(CASES)


# ---------------------------------------------------------------- bad input


X, Y = torch.randn(4, 3, 2), torch.randn(4)


def layer():
    return RandomFeatureAttention(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer()(X[0]), r"x must be \(batch, tokens, 2\), got shape \(3, 2\)"),
        (lambda: layer()(X[..., :1]), r"x must be \(batch, tokens, 2\)"),
        (lambda: layer()(X[:, :1]), "keys must be at least 1, got 0"),
        (lambda: layer()(X.double()), "x must be torch.float32 as W is, got torch.float64"),
        (lambda: RandomFeatureAttention(2, 0), "num_heads must be at least 1, got 0"),
        (lambda: RandomFeatureAttention(0, 3), "d must be at least 1"),
        (lambda: RandomFeatureAttention(2, 3, std=0.0), "std must be positive"),
        (
            lambda: RandomFeatureAttention(2, 3, mean=torch.eye(2)),
            r"mean must be \(3, 3\), got shape \(2, 2\)",
        ),
        (lambda: layer().fit(X, Y, -1.0), "ridge must be non-negative and finite, got -1"),
        (lambda: layer().fit(X, Y, math.nan), "ridge must be non-negative"),
        (lambda: layer().fit(X, Y[:3], 0.1), r"y must be \(4\), got shape \(3,\)"),
        (lambda: layer().fit(X[:0], Y[:0], 0.1), "samples must be at least 1, got 0"),
        (lambda: layer().fit(X, Y * math.nan, 0.1), "y must be finite, got nan"),
        (lambda: layer().ridge_path(X, Y, X, Y, []), "ridges must be at least 1"),
        (lambda: layer().ridge_path(X, Y, X, Y, [0.1, -2.0]), "ridge must be non-negative"),
        (lambda: layer().ridge_path(X, Y, X, Y[:1], [0.1]), "y must be"),
        (lambda: RandomFeatureMLP(2, 4, 5)(X), r"x must be \(batch, 4, 2\)"),
        (lambda: RandomFeatureMLP(2, 3, 0), "num_features must be at least 1"),
        (lambda: rfa_kernel(X, X[..., :1]), r"z must be \(batch, tokens, 2\)"),
        (lambda: rfa_kernel(X[:, :1], X), "keys must be at least 1, got 0"),
        (lambda: rfmlp_kernel(X, X[:, :2]), r"z must be \(batch, 3, 2\)"),
        (lambda: target("averages", 3), "did you mean 'average'"),
        (lambda: target("average", 3, p=0), "p must be at least 1"),
        (lambda: target("average", 3)(X), r"x must be \(batch, tokens, 3\)"),
        (lambda: sphere_sequences(4, 0, 3), "num_keys must be at least 1"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
