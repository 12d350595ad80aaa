"""Exact permutations: data, kernels, closed forms, counts of networks, and the trained ensemble."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.foundations.costs import count_flops, peak_memory
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.shuffles import exact_permutations
from shuffle_nb.shuffles.exact_permutations import (
    PermutationEnsemble,
    all_binary_inputs,
    ensemble_outputs,
    exact_accuracy,
    gradient_step_,
    last_layer_descent_,
    models_for_all_inputs,
    models_needed,
    normalize_inputs,
    ntk_kernels,
    outputs_as_written,
    permutation_matrix,
    prediction_distribution,
    prediction_stats,
    union_bound_models,
)

C = 1 / (2 * math.pi)
KINDS = st.sampled_from(["ntk", "standard"])
PERMS = st.integers(2, 12).flatmap(lambda k: st.permutations(range(k)))
DIAGONAL = {"ntk": 1.0, "standard": 0.5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest_eigenvalue(k: int, kind: str = "ntk") -> float:
    return (DIAGONAL[kind] - C + C * k) / k


def small_ensemble(k=4, width=16, num_models=5, kind="ntk", seed=0, **options):
    return PermutationEnsemble(k, width, num_models, kind, generator(seed), **options)


def binary_rows(k: int, count: int, seed: int = 0) -> torch.Tensor:
    x = torch.randint(0, 2, (count, k), generator=generator(seed))
    x[torch.arange(count), torch.arange(count) % k] = 1  # no row of zeros
    return x


# ---------------------------------------------------------------- the data


@given(PERMS)
def test_the_matrix_moves_bit_i_to_its_place(perm):
    matrix = permutation_matrix(perm)
    unit = torch.eye(len(perm))
    for i, place in enumerate(perm):
        assert torch.equal(matrix @ unit[i], unit[place])
    assert torch.equal(matrix @ matrix.mT, unit)
    assert torch.equal(matrix, permutation_matrix(torch.tensor(perm)))
    assert torch.equal(matrix, permutation_matrix(tuple(perm)))


@pytest.mark.parametrize("k", [2, 3, 6, 10])
def test_all_inputs_are_the_numbers_in_binary(k):
    x = all_binary_inputs(k)
    assert x.shape == (2**k - 1, k)
    assert ["".join(map(str, row)) for row in x.int().tolist()] == [
        f"{m:0{k}b}" for m in range(1, 2**k)
    ]


def test_twenty_bits_are_a_million_inputs():
    assert all_binary_inputs(20).shape == (2**20 - 1, 20)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_inputs_of_any_type_get_length_one(dtype):
    x = all_binary_inputs(5)
    unit = normalize_inputs(x.to(dtype))
    assert unit.is_floating_point()
    assert torch.allclose(unit.norm(dim=1), torch.ones(31, dtype=unit.dtype))
    assert torch.equal(unit > 0, x > 0)


# ---------------------------------------------------------------- kernels


@given(KINDS, st.integers(2, 9))
def test_kernels_at_angle_zero_and_at_a_right_angle(kind, k):
    unit = torch.eye(k, dtype=torch.float64)
    nngp, ntk = ntk_kernels(unit, unit, kind)
    off = C * (1 - unit)
    assert torch.allclose(k * nngp, 0.5 * unit + off, rtol=0, atol=1e-15)
    assert torch.allclose(k * ntk, DIAGONAL[kind] * unit + off, rtol=0, atol=1e-15)
    eigenvalues = torch.linalg.eigvalsh(ntk)
    assert eigenvalues[-1].item() == pytest.approx(largest_eigenvalue(k, kind))
    assert torch.allclose(eigenvalues[:-1] * k, torch.tensor(DIAGONAL[kind] - C).double())
    for kernel in ntk_kernels(unit, -unit, kind):
        assert kernel.diagonal().abs().max() < 1e-15


def test_kernels_keep_all_digits_near_angle_zero():
    x = torch.full((1, 7), 7**-0.5, dtype=torch.float64)
    nngp, ntk = ntk_kernels(x, x)
    assert abs(7 * nngp.item() - 0.5) < 1e-15
    assert abs(7 * ntk.item() - 1.0) < 1e-15


@pytest.mark.parametrize("kind", ["ntk", "standard"])
def test_kernels_are_those_of_a_wide_network(kind):
    """K: covariance of outputs over draws. Theta: inner product of gradients, by autograd."""
    k, width = 3, 60_000
    x = normalize_inputs(all_binary_inputs(k)).double()
    layers = torch.randn(2, 1, k, width, generator=generator(), dtype=torch.float64)
    first, second = (layer.requires_grad_() for layer in layers.unbind())
    trained = (first, second) if kind == "ntk" else (second,)
    outputs = ensemble_outputs(first, second, x)[0, :, 0]
    rows = [torch.autograd.grad(output, trained, retain_graph=True) for output in outputs]
    gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    nngp, ntk = ntk_kernels(x, x, kind)
    assert torch.allclose(k * gradients @ gradients.mT, k * ntk, atol=0.03)
    ensemble = PermutationEnsemble(k, 512, 4000, generator=generator(1), dtype=torch.float64)
    drawn = ensemble.predict_raw(all_binary_inputs(k))[..., 0]
    assert torch.allclose(k * drawn.mT @ drawn / 4000, k * nngp, atol=0.06)


# ---------------------------------------------------------------- closed forms


@given(KINDS, st.integers(2, 64))
def test_a_training_point_is_exact(kind, k):
    assert prediction_stats(k, 1, kind) == pytest.approx((1, 0, 0), abs=1e-14)


def test_the_sign_of_the_mean_is_right_everywhere():
    for kind, k in itertools.product(DIAGONAL, range(2, 65)):
        for n in range(2, k + 1):
            mu1, mu0, variance = prediction_stats(k, n, kind)
            assert mu1 > 0 and variance > 0
            assert math.isnan(mu0) if n == k else mu0 < 0


@given(KINDS, st.integers(2, 64))
def test_all_ones_and_the_other_form_of_mu0(kind, k):
    diagonal, determinant = DIAGONAL[kind], DIAGONAL[kind] - C + C * k

    def t1(n):
        angle = math.acos(1 / math.sqrt(n))
        turns = (2 if kind == "ntk" else 1) * (math.pi - angle) / math.sqrt(n)
        return C * (math.sin(angle) + turns)

    assert prediction_stats(k, k, kind)[0] == pytest.approx(t1(k) / determinant, abs=1e-13)
    for n in range(1, k):
        mu0 = C * (diagonal - C - n * (t1(n) - C)) / ((diagonal - C) * determinant)
        assert prediction_stats(k, n, kind)[1] == pytest.approx(mu0, abs=1e-13)


@settings(deadline=None, max_examples=40)
@given(PERMS, KINDS, st.integers(0, 1000))
def test_closed_forms_are_kernel_regression(perm, kind, seed):
    k = len(perm)
    x = binary_rows(k, 12, seed)
    unit, train = normalize_inputs(x.double()), torch.eye(k, dtype=torch.float64)
    k_train, theta_train = ntk_kernels(train, train, kind)
    k_cross, theta_cross = ntk_kernels(unit, train, kind)
    A = torch.linalg.solve(theta_train, theta_cross.mT).mT
    expected = A @ permutation_matrix(perm).mT.double()
    brute = 1 / (2 * k) + ((A @ k_train) * A).sum(1) - 2 * (A * k_cross).sum(1)
    mean, variance = prediction_distribution(x, perm, kind)
    assert mean.dtype == variance.dtype == torch.float64
    assert torch.allclose(mean, expected, rtol=0, atol=1e-12)
    assert torch.allclose(variance, brute, rtol=0, atol=1e-12)
    for row, n in enumerate(x.sum(1).tolist()):
        mu1, mu0, var = prediction_stats(k, n, kind)
        ones = A[row][x[row] == 1]
        assert torch.allclose(ones, torch.full_like(ones, mu1), rtol=0, atol=1e-12)
        if n < k:
            zeros = A[row][x[row] == 0]
            assert torch.allclose(zeros, torch.full_like(zeros, mu0), rtol=0, atol=1e-12)
        assert variance[row].item() == pytest.approx(var, abs=1e-15)


@settings(deadline=None)
@given(PERMS, KINDS, st.randoms())
def test_equivariance(perm, kind, random):
    k = len(perm)
    x, rename = binary_rows(k, 9), random.sample(range(k), k)
    identity, variance = prediction_distribution(x, range(k), kind)
    moved, moved_variance = prediction_distribution(x, perm, kind)
    assert torch.equal(moved, identity @ permutation_matrix(perm).mT.double())
    renamed, _ = prediction_distribution(x[:, rename], range(k), kind)
    assert torch.equal(renamed, identity[:, rename])
    assert torch.equal(variance, moved_variance)
    # Swapping inputs inside the support changes nothing: all of them have one mean.
    assert all(
        len(set(row[bits == 1].tolist())) == 1 for row, bits in zip(identity, x, strict=True)
    )


@pytest.mark.parametrize(
    ("k", "n", "kind", "expected"),
    [
        (10, 2, "ntk", (0.56542, -0.00985, 0.00652)),
        (8, 5, "ntk", (0.27760, -0.04684, 0.01610)),
        (10, 2, "standard", (0.61794, -0.02326, 0.00628)),
    ],
)
def test_check_values(k, n, kind, expected):
    assert prediction_stats(k, n, kind) == pytest.approx(expected, abs=6e-6)


# ---------------------------------------------------------------- how many networks


def test_models_needed_for_two_ones():
    bits = [5, 10, 15, 20, 25, 30]
    assert [models_needed(k, 2, 0.9) for k in bits] == [205, 333, 454, 579, 708, 840]
    assert [models_needed(k, 2, 0.9, "standard") for k in bits] == [28, 58, 89, 121, 155, 190]
    strict = [models_needed(k, 2, 0.999, "standard") for k in bits[1:]]
    assert strict == [156, 219, 284, 351, 419]


def test_models_for_all_inputs_at_once():
    bits = [4, 6, 8, 10, 16, 32]
    assert [models_for_all_inputs(k) for k in bits] == [363, 532, 670, 801, 1197, 2330]
    bounds = [union_bound_models(k, 0.1, all_inputs=True) for k in bits]
    assert bounds[:2] == [818, 1019] and bounds[-1] == 6874
    assert all(bound >= models_for_all_inputs(k) for k, bound in zip(bits, bounds, strict=True))


@settings(deadline=None)
@given(st.integers(2, 40), st.data(), KINDS, st.floats(0.05, 0.9999))
def test_the_number_of_models_is_the_smallest(k, data, kind, accuracy):
    n = data.draw(st.integers(1, k))
    models = models_needed(k, n, accuracy, kind)
    assert exact_accuracy(k, n, models, kind) >= accuracy
    assert models == 1 or exact_accuracy(k, n, models - 1, kind) < accuracy
    if n > 1:
        assert union_bound_models(k, 1 - accuracy, parametrization=kind) >= models


@settings(deadline=None)
@given(st.integers(2, 20), st.data(), KINDS, st.integers(1, 3000))
def test_accuracy_is_the_product_of_gaussian_tails(k, data, kind, models):
    n = data.draw(st.integers(2, k))
    mu1, mu0, variance = prediction_stats(k, n, kind)

    def phi(z):
        return math.erfc(-z / math.sqrt(2)) / 2

    scale = math.sqrt(models / variance)
    expected = phi(scale * mu1) ** n * (phi(-scale * mu0) ** (k - n) if n < k else 1)
    assert exact_accuracy(k, n, models, kind) == pytest.approx(expected, rel=1e-11)
    assert exact_accuracy(k, n, models + 1, kind) >= exact_accuracy(k, n, models, kind) - 1e-15


@pytest.mark.parametrize("kind", ["ntk", "standard"])
@pytest.mark.parametrize(("k", "delta"), [(6, 0.1), (32, 0.1), (32, 1e-6), (64, 1e-9)])
def test_tails_times_binomials_neither_overflow_nor_vanish(k, delta, kind):
    def expected_failures(models):
        total = 0.0
        for n in range(2, k + 1):
            mu1, mu0, variance = prediction_stats(k, n, kind)
            wrong = [math.erfc(math.sqrt(models / variance / 2) * mu1) / 2] * n
            if n < k:
                wrong += [math.erfc(-math.sqrt(models / variance / 2) * mu0) / 2] * (k - n)
            log_right = math.fsum(math.log1p(-p) for p in wrong)
            total += math.comb(k, n) * -math.expm1(log_right)
        return total

    models = models_for_all_inputs(k, delta, kind)
    assert expected_failures(models) <= delta * (1 + 1e-9)
    assert expected_failures(models - 1) > delta * (1 - 1e-9)


def test_many_bits_do_not_overflow():
    assert models_for_all_inputs(1200) > models_for_all_inputs(600) > 10_000


def test_two_ones_are_hardest():
    for kind, k in itertools.product(DIAGONAL, range(4, 33)):
        counts = [models_needed(k, n, 0.9, kind) for n in range(2, k + 1)]
        assert max(counts) == counts[0]


def test_growth_is_at_most_k_log_k_and_k_squared():
    bits = range(4, 33)
    one = [models_needed(k, 2) / (k * math.log(k)) for k in bits]
    everything = [models_for_all_inputs(k) / k**2 for k in bits]
    assert one == sorted(one, reverse=True)
    assert everything == sorted(everything, reverse=True)
    assert everything[0] == pytest.approx(22.7, abs=0.05)
    assert everything[-1] == pytest.approx(2.3, abs=0.05)


def test_one_hot_inputs_need_one_network():
    assert exact_accuracy(9, 1, 1) == 1.0
    assert models_needed(9, 1, 0.9999) == 1


# ---------------------------------------------------------------- network and training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_those_of_the_formula_network_by_network(dtype):
    ensemble = small_ensemble(dtype=dtype)
    x = normalize_inputs(all_binary_inputs(4)).to(dtype)
    outputs = ensemble(x)
    assert outputs.shape == (5, 15, 4) and outputs.dtype == dtype
    for j in range(5):
        W1, W2 = ensemble.first[j].mT, ensemble.second[j]  # (h, k) and (k, h)
        for row in range(15):
            expected = W2 @ torch.relu(W1 @ x[row] / 4**0.5) / 16**0.5
            assert torch.allclose(outputs[j, row], expected, atol=1e-5)


def test_gradcheck():
    first, second = small_ensemble(3, 5, 2, dtype=torch.float64).parameters()
    x = normalize_inputs(all_binary_inputs(3)).double().requires_grad_()
    assert torch.autograd.gradcheck(ensemble_outputs, (first, second, x))


def descend(ensemble, perm, lr, steps, trained):
    """Gradient descent by automatic differentiation, one network after the other."""
    target = permutation_matrix(perm).mT.to(ensemble.first)
    inputs = torch.eye(ensemble.k).to(ensemble.first)
    weights = {"first": [], "second": []}
    for layers in zip(ensemble.first, ensemble.second, strict=True):
        layers = [layer.detach().clone()[None].requires_grad_() for layer in layers]
        moving = layers[2 - trained :]
        for _ in range(steps):
            loss = 0.5 * (ensemble_outputs(*layers, inputs) - target).square().sum()
            for layer, gradient in zip(moving, torch.autograd.grad(loss, moving), strict=True):
                layer.data -= lr * gradient
        for name, layer in zip(weights, layers, strict=True):
            weights[name].append(layer.detach())
    return torch.cat(weights["first"]), torch.cat(weights["second"])


@settings(deadline=None, max_examples=25)
@given(PERMS, st.integers(1, 20), st.integers(1, 5), st.integers(0, 100))
def test_a_step_by_hand_is_the_gradient(perm, width, models, seed):
    ensemble = small_ensemble(len(perm), width, models, seed=seed, dtype=torch.float64)
    expected = descend(ensemble, perm, 0.3, 1, trained=2)
    target = permutation_matrix(perm).mT.double()
    errors = gradient_step_(ensemble.first, ensemble.second, target, 0.3)
    assert errors.shape == (models, len(perm), len(perm))
    assert torch.allclose(ensemble.first, expected[0], atol=1e-12)
    assert torch.allclose(ensemble.second, expected[1], atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(KINDS, st.integers(0, 12), st.sampled_from([None, 1, 2, 5, 99]), st.integers(0, 50))
def test_fit_is_gradient_descent_whatever_the_chunks(kind, steps, chunk_size, seed):
    perm = [2, 0, 3, 1]
    ensemble = small_ensemble(kind=kind, seed=seed, dtype=torch.float64, chunk_size=chunk_size)
    lr = 0.8 / largest_eigenvalue(4, kind)
    expected = descend(ensemble, perm, lr, steps, trained=2 if kind == "ntk" else 1)
    assert ensemble.fit(perm, steps, lr) is ensemble
    assert torch.allclose(ensemble.first, expected[0], atol=1e-11)
    assert torch.allclose(ensemble.second, expected[1], atol=1e-11)


def test_the_default_step_is_one_over_the_largest_eigenvalue():
    for kind in DIAGONAL:
        default = small_ensemble(kind=kind).fit([1, 0, 3, 2], 3)
        explicit = small_ensemble(kind=kind).fit([1, 0, 3, 2], 3, 1 / largest_eigenvalue(4, kind))
        assert torch.equal(default.second, explicit.second)


def test_which_layers_train():
    for kind in DIAGONAL:
        ensemble = small_ensemble(kind=kind)
        before = copy.deepcopy(ensemble).fit([0, 1, 2, 3], steps=0)
        ensemble.fit([1, 2, 3, 0])
        assert torch.equal(before.first, ensemble.first) == (kind == "standard")
        assert not torch.equal(before.second, ensemble.second)


@pytest.mark.parametrize(("kind", "steps", "bound"), [("ntk", 50, 1e-5), ("standard", 60, 2e-5)])
@pytest.mark.parametrize("k", [4, 6, 8])
def test_training_ends_at_zero_loss(k, kind, steps, bound):
    perm = torch.randperm(k, generator=generator(1))
    ensemble = small_ensemble(k, 1024, 20, kind).fit(perm, steps)
    residual = ensemble.predict_raw(torch.eye(k)) - permutation_matrix(perm).mT
    assert residual.abs().max() < bound


def test_errors_follow_the_kernel_in_wide_networks():
    k, perm = 6, [2, 0, 5, 1, 4, 3]
    lr, target = 1 / largest_eigenvalue(k), permutation_matrix(perm).mT
    first, second = torch.randn(2, 4, k, 8192, generator=generator())
    _, theta = ntk_kernels(torch.eye(k), torch.eye(k))
    errors = [gradient_step_(first, second, target, lr) for _ in range(13)]
    predicted = errors[0]
    for error in errors:
        assert (error - predicted).norm() < 0.05 * errors[0].norm()
        predicted = (torch.eye(k) - lr * theta) @ predicted


@pytest.mark.parametrize("kind", ["ntk", "standard"])
def test_moments_at_finite_width(kind):
    k, width, models = 6, 1024, 400
    perm = [3, 5, 0, 1, 4, 2]
    ensemble = small_ensemble(k, width, models, kind, seed=4).fit(perm, 60)
    x = all_binary_inputs(k)
    raw, ones = ensemble.predict_raw(x).double(), x.sum(1)
    bits = (x @ permutation_matrix(perm).mT).bool()
    for n in range(1, k + 1):
        mean, chosen = raw.mean(0)[ones == n], bits[ones == n]
        mu1, mu0, variance = prediction_stats(k, n, kind)
        room = 3 * math.sqrt(variance / models) + 2 / width
        assert abs(mean[chosen].mean() - mu1) < room
        if n < k:
            assert abs(mean[~chosen].mean() - mu0) < room
        if n > 1:
            assert abs(raw.var(0)[ones == n].mean() / variance - 1) < 0.1


def test_exact_on_every_input_of_six_bits():
    perm = torch.randperm(6, generator=generator(7))
    ensemble = small_ensemble(6, 512, 900, seed=0).fit(perm, 40)
    x = all_binary_inputs(6)
    targets = x @ permutation_matrix(perm).mT
    assert torch.equal(ensemble.predict(x), targets)
    single = (ensemble.predict(x, num_models=1) == targets).all(1)[x.sum(1) > 1]
    assert single.float().mean() <= 0.5


# ---------------------------------------------------------------- chunks and biases


def with_biases(kind="ntk", seed=0, k=4, width=16, models=5, **options):
    """Networks whose biases are not zero."""
    ensemble = small_ensemble(k, width, models, kind, seed, biases=True, **options)
    with torch.no_grad():
        for bias in (ensemble.first_bias, ensemble.second_bias):
            bias.normal_(generator=generator(seed))
    return ensemble


def by_layers(ensemble, j, x):
    """One network with biases as the authors write it: factors in the weights, two linear maps."""
    first, second, first_bias, second_bias = (layer[j] for layer in ensemble.layers)
    hidden = torch.nn.functional.linear(
        x, first.mT / ensemble.k**0.5, first_bias[0] / ensemble.k**0.5
    ).relu()
    return torch.nn.functional.linear(
        hidden, second / ensemble.width**0.5, second_bias[0] / ensemble.width**0.5
    )


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 99])
def test_outputs_and_gradients_do_not_depend_on_the_chunks(chunk_size, biases):
    whole = with_biases(dtype=torch.float64) if biases else small_ensemble(dtype=torch.float64)
    parts = copy.deepcopy(whole)
    parts.chunk_size = chunk_size
    x = normalize_inputs(all_binary_inputs(4)).double()
    expected = whole(x)
    if not biases:
        assert torch.allclose(outputs_as_written(whole.first, whole.second, x), expected)
    assert torch.allclose(parts(x), expected, atol=1e-14)
    for ensemble in (whole, parts):
        ensemble(x).square().sum().backward()
    for ours, theirs in zip(parts.layers, whole.layers, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


def test_chunks_take_less_memory_than_all_at_once():
    layers = torch.randn(2, 256, 8, 256).requires_grad_().unbind()
    x = normalize_inputs(all_binary_inputs(8))
    for backward, ratio in ((False, 4), (True, 1.5)):
        plain = peak_memory(outputs_as_written, *layers, x, backward=backward)
        assert plain > ratio * peak_memory(ensemble_outputs, *layers, x, backward=backward)


def test_biases_begin_at_zero_and_change_nothing():
    plain, biased = small_ensemble(), small_ensemble(biases=True)
    x = all_binary_inputs(4)
    assert torch.allclose(plain.predict_raw(x), biased.predict_raw(x), atol=1e-7)
    assert set(biased.state_dict()) == {"first", "second", "first_bias", "second_bias"}
    assert set(plain.state_dict()) == {"first", "second"}


def test_biases_stand_where_the_authors_have_them():
    ensemble = with_biases(dtype=torch.float64)
    x = normalize_inputs(all_binary_inputs(4)).double()
    for j in range(5):
        assert torch.allclose(ensemble(x)[j], by_layers(ensemble, j, x), atol=1e-14)


@pytest.mark.parametrize("kind", ["ntk", "standard"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_fit_with_biases_is_gradient_descent(kind, chunk_size):
    ensemble = with_biases(kind, dtype=torch.float64, chunk_size=chunk_size)
    other, lr = copy.deepcopy(ensemble), 0.5
    target = permutation_matrix([2, 0, 3, 1]).mT.double()
    for _ in range(4):
        outputs = other(torch.eye(4).double())
        gradients = torch.autograd.grad((outputs - target).square().sum() / 2, other.layers)
        for place, (layer, gradient) in enumerate(zip(other.layers, gradients, strict=True)):
            if kind == "ntk" or place in (1, 3):  # first, second, first bias, second bias
                layer.data -= lr * gradient
    ensemble.fit([2, 0, 3, 1], steps=4, lr=lr)
    for ours, expected in zip(ensemble.layers, other.layers, strict=True):
        assert torch.allclose(ours, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["ntk", "standard"])
def test_the_step_with_biases_knows_their_kernel(kind):
    k, width = 3, 40_000
    ensemble = small_ensemble(k, width, 1, kind, biases=True, dtype=torch.float64)
    outputs = ensemble(torch.eye(k).double())[0, :, 0]
    moving = [ensemble.layers[i] for i in (range(4) if kind == "ntk" else (1, 3))]
    rows = [torch.autograd.grad(output, moving, retain_graph=True) for output in outputs]
    gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    found = torch.linalg.eigvalsh(gradients @ gradients.mT)[-1]
    expected = exact_permutations._largest_eigenvalue(k, kind, width)
    assert found.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", ["ntk", "standard"])
def test_training_with_biases_ends_at_zero_loss(kind):
    ensemble = small_ensemble(6, 512, 10, kind, biases=True).fit(range(6), steps=150)
    residual = ensemble.predict_raw(torch.eye(6)) - torch.eye(6)
    assert residual.abs().max() < 1e-4
    assert ensemble.second_bias.any() and ensemble.first_bias.any() == (kind == "ntk")


# ---------------------------------------------------------------- prediction


@pytest.mark.parametrize("kind", ["ntk", "standard"])
@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_predictions_do_not_depend_on_the_memory_budget(kind, budget, monkeypatch):
    ensemble = small_ensemble(kind=kind)
    monkeypatch.setitem(exact_permutations.ACTIVATIONS, "cpu", budget)
    ensemble.fit([1, 3, 0, 2])
    x = all_binary_inputs(4)
    raw = ensemble.predict_raw(x)
    assert torch.allclose(raw, ensemble(normalize_inputs(x)).detach(), atol=1e-6)
    for count in (1, 3, 5):
        expected = (raw[:count].mean(0) > 1e-4).float()
        assert torch.equal(ensemble.predict(x, count), expected)
    reference = small_ensemble(kind=kind).fit([1, 3, 0, 2])
    assert torch.allclose(ensemble.second, reference.second, atol=1e-5)


def test_outputs_are_averaged_before_they_are_rounded():
    ensemble = small_ensemble(2, 1, 3)
    with torch.no_grad():
        ensemble.first.fill_(1.0)
        ensemble.second.copy_(torch.tensor([-1.0, -1.0, 5.0])[:, None, None].expand(3, 2, 1))
    x = torch.tensor([[1, 1]])
    assert (ensemble.predict_raw(x) > 0).float().mean() < 0.5  # a vote would say 0
    assert ensemble.predict(x).tolist() == [[1, 1]]
    assert ensemble.predict(x, num_models=2).tolist() == [[0, 0]]


def test_threshold_may_differ_by_input():
    ensemble = small_ensemble().fit([1, 3, 0, 2])
    x = all_binary_inputs(4)
    cuts = torch.linspace(-1, 1, 15)[:, None]
    expected = (ensemble.predict_raw(x).mean(0) > cuts).float()
    assert torch.equal(ensemble.predict(x, threshold=cuts), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float64])
def test_bits_come_back_in_the_type_of_the_input(dtype):
    ensemble = small_ensemble().fit([1, 3, 0, 2])
    x = all_binary_inputs(4)
    bits = ensemble.predict(x.to(dtype))
    assert bits.dtype == dtype
    assert torch.equal(bits.float(), ensemble.predict(x))


def test_no_inputs_are_no_outputs():
    ensemble = small_ensemble()
    assert ensemble.predict_raw(torch.zeros(0, 4)).shape == (5, 0, 4)
    assert ensemble.predict(torch.zeros(0, 4)).shape == (0, 4)


# ---------------------------------------------------------------- a module like any other


def test_a_generator_decides_the_weights_and_the_global_stream_is_left_alone():
    state = torch.get_rng_state()
    first, second = small_ensemble(seed=3), small_ensemble(seed=3)
    assert torch.equal(first.first, second.first) and torch.equal(first.second, second.second)
    assert not torch.equal(first.first, small_ensemble(seed=4).first)
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dict_round_trip():
    trained, other = small_ensemble().fit([3, 2, 1, 0]), small_ensemble(seed=9)
    other.load_state_dict(trained.state_dict())
    x = all_binary_inputs(4)
    assert torch.equal(trained.predict_raw(x), other.predict_raw(x))


def test_float64_and_moving_the_type():
    ensemble = small_ensemble(6, 64, 8).double().fit(range(6), 200)
    raw = ensemble.predict_raw(torch.eye(6))
    assert raw.dtype == torch.float64
    assert (raw - torch.eye(6)).abs().max() < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_weights_of_the_cpu():
    perm, x = [2, 0, 5, 1, 4, 3], all_binary_inputs(6)
    options = dict(k=6, width=256, num_models=40)
    on_cpu = small_ensemble(**options).fit(perm)
    on_gpu = small_ensemble(**options, device="cuda").fit(perm)
    assert on_gpu.first.is_cuda
    assert torch.allclose(on_gpu.predict_raw(x).cpu(), on_cpu.predict_raw(x), atol=1e-4)
    drawn_there = PermutationEnsemble(6, generator=torch.Generator("cuda").manual_seed(0))
    assert drawn_there.first.is_cuda
    mean, _ = prediction_distribution(x.cuda(), perm)
    assert mean.is_cuda


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("kind", ["ntk", "standard"])
def test_the_training_step_compiles_without_graph_breaks(kind):
    ensemble = small_ensemble(kind=kind)
    compiled = copy.deepcopy(ensemble)
    target = permutation_matrix([2, 3, 1, 0]).mT.contiguous()
    step = (
        gradient_step_
        if kind == "ntk"
        else lambda first, second, target, lr: last_layer_descent_(first, second, target, lr, 3)
    )
    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        step(ensemble.first.data, ensemble.second.data, target, 0.5)
        fast(compiled.first.data, compiled.second.data, target, 0.5)
    assert torch.allclose(compiled.first, ensemble.first, atol=1e-6)
    assert torch.allclose(compiled.second, ensemble.second, atol=1e-6)


@pytest.mark.usefixtures("plain_python")
def test_forward_compiles_and_runs_under_autocast():
    ensemble = small_ensemble()
    x = normalize_inputs(all_binary_inputs(4))
    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), ensemble(x), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ensemble(x).dtype == torch.bfloat16
        inside = small_ensemble().fit([1, 3, 0, 2])  # trains in the weights' own precision
    assert torch.equal(inside.second, small_ensemble().fit([1, 3, 0, 2]).second)


def test_a_step_costs_what_the_formula_says():
    for k, width, models in ((3, 10, 2), (6, 64, 5), (8, 32, 9)):
        first, second = torch.randn(2, models, k, width)
        target = permutation_matrix(range(k))
        counted = count_flops(lambda f, s, t: gradient_step_(f, s, t, 0.1), first, second, target)
        assert counted == models * 6 * width * k**2


def test_the_number_of_calls_does_not_grow_with_the_ensemble(monkeypatch):
    calls = []
    monkeypatch.setattr(
        exact_permutations, "gradient_step_", lambda *args: calls.append(len(args[0]))
    )
    small_ensemble(4, 16, 500).fit(range(4), steps=7)
    assert calls == [500] * 7


# ---------------------------------------------------------------- bad input


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: permutation_matrix([0, 2]), r"perm must be in 0\.\.1, got 0 to 2"),
            (lambda: permutation_matrix([1, 1, 0]), r"permutation of range\(3\)"),
            (lambda: permutation_matrix(torch.tensor([0, 3, 1])), r"perm must be in 0\.\.2"),
            (lambda: permutation_matrix([0]), "k must be at least 2 bits, got 1"),
            (lambda: all_binary_inputs(1), r"k must be in 2\.\.20"),
            (lambda: all_binary_inputs(21), r"k must be in 2\.\.20, got 21"),
            (lambda: normalize_inputs(torch.tensor([[0, 1], [0, 0]])), "nonzero binary inputs"),
            (
                lambda: normalize_inputs(torch.tensor([[0.5, 1.0]])),
                "nonzero binary inputs required",
            ),
            (lambda: normalize_inputs(torch.tensor([[-1, 1]])), "nonzero binary inputs required"),
            (lambda: normalize_inputs(torch.ones(3)), r"\(batch, k\), got shape \(3,\)"),
            (lambda: ntk_kernels(torch.ones(1, 2), torch.eye(2)), "x must have rows of length 1"),
            (lambda: ntk_kernels(torch.eye(2), torch.ones(1, 2)), "z must have rows of length 1"),
            (lambda: ntk_kernels(torch.eye(2), torch.eye(3)), r"z must be \(columns, 2\)"),
            (lambda: ntk_kernels(torch.eye(2), torch.eye(2), "mup"), r"\['ntk', 'standard'\]"),
            (lambda: prediction_stats(5, 0), r"n must be in 1\.\.5, got 0"),
            (lambda: prediction_stats(5, 6), r"n must be in 1\.\.5, got 6"),
            (lambda: prediction_stats(1, 1), "k must be at least 2 bits"),
            (lambda: prediction_stats(5, 2, "ntkk"), "got 'ntkk'"),
            (lambda: prediction_distribution(torch.zeros(1, 3), range(3)), "nonzero binary"),
            (
                lambda: prediction_distribution(torch.ones(1, 3), range(4)),
                r"perm must be \(3\)",
            ),
            (lambda: exact_accuracy(5, 6, 1), r"n must be in 1\.\.5"),
            (lambda: exact_accuracy(5, 2, 0), "num_models must be at least 1, got 0"),
            (lambda: exact_accuracy(5, 2, 1, "x"), r"\['ntk', 'standard'\]"),
            (lambda: models_needed(5, 0), r"n must be in 1\.\.5"),
            (lambda: models_needed(5, 2, 1.0), "accuracy must be between 0 and 1, got 1.0"),
            (lambda: models_needed(5, 2, 0.0), "accuracy must be between 0 and 1"),
            (lambda: models_needed(5, 1, 0.9, "x"), r"\['ntk', 'standard'\]"),
            (lambda: models_for_all_inputs(1), "k must be at least 2"),
            (lambda: models_for_all_inputs(5, 0.0), "delta must be between 0 and 1"),
            (lambda: models_for_all_inputs(5, 0.1, "x"), r"\['ntk', 'standard'\]"),
            (lambda: union_bound_models(5, 1.0), "delta must be between 0 and 1, got 1.0"),
            (lambda: union_bound_models(1, 0.1), "k must be at least 2"),
            (lambda: PermutationEnsemble(1), "k must be at least 2 bits, got 1"),
            (lambda: PermutationEnsemble(4, width=0), "width must be at least 1, got 0"),
            (lambda: PermutationEnsemble(4, num_models=0), "num_models must be at least 1"),
            (lambda: PermutationEnsemble(4, 8, 2, chunk_size=0), "chunk_size must be at least 1"),
            (lambda: PermutationEnsemble(4, 8, 2, "adam"), r"\['ntk', 'standard'\], got 'adam'"),
            (lambda: small_ensemble().fit([0, 1, 2]), r"perm must be \(4\)"),
            (lambda: small_ensemble().fit([0, 1, 2, 2]), r"permutation of range\(4\)"),
            (lambda: small_ensemble().fit(range(4), steps=-1), "steps must not be negative"),
            (lambda: small_ensemble().fit(range(4), lr=0.0), "lr must be in"),
            (
                lambda: small_ensemble().fit(range(4), lr=2 / largest_eigenvalue(4)),
                r"lr must be in \(0, .*diverges",
            ),
            (
                lambda: small_ensemble(kind="standard").fit(
                    range(4), lr=2 / largest_eigenvalue(4, "standard")
                ),
                "diverges",
            ),
            (lambda: small_ensemble().predict(torch.zeros(1, 4)), "nonzero binary inputs required"),
            (lambda: small_ensemble().predict_raw(torch.ones(1, 3)), r"\(batch, 4\), got shape"),
            (lambda: small_ensemble().predict(torch.ones(4)), r"\(batch, 4\), got shape \(4,\)"),
            (
                lambda: small_ensemble().predict(torch.ones(1, 4), 6),
                r"must be in 1\.\.5",
            ),
            (
                lambda: small_ensemble().predict(torch.ones(1, 4), 0),
                r"must be in 1\.\.5",
            ),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- the authors' own numbers


def loaded(case, kind="ntk"):
    """An ensemble with the weights of a case: first holds columns of W1, second rows of W2."""
    W1, W2 = case.tensors["W1"], case.tensors["W2"]
    models, width, k = W1.shape
    ensemble = PermutationEnsemble(k, width, models, kind, dtype=torch.float64)
    ensemble.load_state_dict({"first": W1.mT, "second": W2})
    return ensemble


def trained(case):
    settings = case.settings
    kind = settings["parametrization"]
    ensemble = loaded(case, kind).fit(settings["perm"], settings["steps"], settings["lr"])
    raw, target = ensemble.predict_raw(case.tensors["x"]), permutation_matrix(settings["perm"]).mT
    unit = torch.eye(settings["k"], dtype=torch.float64)
    return {
        "residual on the one-hot rows": ensemble(unit) - target,
        "W1 afterwards": ensemble.first.mT,
        "W2 afterwards": ensemble.second,
        "raw predictions": raw,
        "mean over networks": raw.mean(0),
    }


def untrained(case):
    raw = loaded(case).predict_raw(case.tensors["x"])
    return {"raw predictions": raw, "mean over networks": raw.mean(0)}


def closed_forms(case):
    def named(function, arguments):
        call = f"{function.__name__}({', '.join(map(str, arguments))})"
        return call, torch.tensor(function(*arguments), dtype=torch.float64)

    settings = case.settings
    found = dict(named(prediction_stats, row) for row in settings["stats"])
    for k, kind in settings["stats n = k"]:
        ends = torch.tensor(prediction_stats(k, k, kind), dtype=torch.float64)[[0, 2]]
        found[f"prediction_stats({k}, {k}, {kind}): first and last"] = ends
    found |= dict(named(exact_accuracy, row) for row in settings["accuracy"])
    found |= dict(named(models_needed, row) for row in settings["needed"])
    found |= dict(named(models_for_all_inputs, row) for row in settings["all"])
    x, z = (torch.nn.functional.normalize(case.tensors[name]) for name in "xz")
    return found | dict(zip(("K(x, z)", "Theta(x, z)"), ntk_kernels(x, z), strict=True))


RECOMPUTE = {
    "ensemble before training": untrained,
    "four steps of gradient descent on both layers": trained,
    "six steps on the last layer only": trained,
    "closed forms": closed_forms,
}


@pytest.mark.parametrize("case", [*load_reference("exact_permutations")], ids=lambda c: c.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
