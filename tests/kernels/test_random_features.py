"""Random features: the exponential of a product, draws that are orthogonal, draws of one's own."""

from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from draws import normal, seeded, unit
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.foundations.training import fit_arms
from shuffle_nb.kernels.random_features import (
    Bottleneck,
    accuracy,
    gaussian_features,
    gaussian_rows,
    learner,
    mlp,
    orthogonal_gaussian,
    own_generator,
    ridge_regression,
    settle,
    some_classes,
    unit_digits,
    unsigned_rows,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


# ---------------------------------------------------------------- the exponential


@pytest.mark.parametrize("M", [0.0, 0.005, 0.02])
@pytest.mark.parametrize("phase", [1, 1j, (1 + 1j) / sqrt(2)])
def test_exponential_is_unbiased_for_real_and_complex_arguments(M, phase):
    g = normal(400_000, 4)
    u, v = 0.8 * unit(4, seed=1) * phase, 0.7 * unit(4, seed=2) + 0j
    products = gaussian_features(u, g, M=M) * gaussian_features(v, g, M=M)
    error = products.mean() - torch.exp((u * v).sum())
    assert error.abs() < 4 * products.std() / len(g) ** 0.5


@SMALL
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.floats(0, 0.5))
def test_gaussian_features_are_the_formula_entry_by_entry(seed, d, m, M):
    z, g = normal(2, 3, d, seed=seed), normal(m, d, seed=seed + 1)
    found = gaussian_features(z, g, M=M)
    assert found.shape == (2, 3, m)
    for index in range(m):
        inner = sqrt(1 + 4 * M) * (z @ g[index]) - (z * z).sum(-1) / 2
        expected = (1 + 4 * M) ** (d / 4) * torch.exp(inner - M * g[index] @ g[index])
        assert torch.allclose(found[..., index], expected, rtol=1e-10)


def test_complex_products_take_no_conjugate():
    g = normal(7, 3)
    z = normal(3) * 1j
    assert torch.allclose(
        gaussian_features(z, g), torch.exp(g @ z.imag * 1j + (z.imag @ z.imag) / 2)
    )


# ---------------------------------------------------------------- orthogonal draws


@SMALL
@given(SEEDS, st.integers(1, 40), st.integers(1, 9), st.sampled_from(["chi", "sqrt_d"]))
def test_rows_of_a_block_are_orthogonal(seed, m, d, scaling):
    rows = orthogonal_gaussian(m, d, scaling=scaling, generator=seeded(seed), dtype=torch.float64)
    assert rows.shape == (m, d) and rows.dtype == torch.float64
    for block in rows.split(d):
        gram = F.normalize(block, dim=1) @ F.normalize(block, dim=1).T
        assert torch.allclose(gram, torch.eye(len(block), dtype=torch.float64), atol=1e-10)
    if scaling == "sqrt_d":
        assert torch.allclose(rows.norm(dim=1), torch.full((m,), sqrt(d)).double())


def test_lengths_are_those_of_gaussian_vectors():
    squares = orthogonal_gaussian(30_000, 10, generator=seeded()).square().sum(1)
    assert squares.mean() == pytest.approx(10, abs=4 * sqrt(20 / 30_000))
    assert squares.var() == pytest.approx(20, rel=0.05)


def check_moments(rows):  # (draws, rows, d)
    """Compare the first four moments of every entry with those of N(0, 1)."""
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        allowed = 5 * sqrt(variance / len(rows))
        assert (rows.pow(moment).mean(0) - expected).abs().max() < allowed


def test_each_row_by_itself_is_standard_normal():
    check_moments(orthogonal_gaussian(20_000, 5, generator=seeded()).reshape(-1, 5, 5))
    generator = seeded(1)
    parts = [orthogonal_gaussian(3, 5, generator=generator) for _ in range(1000)]
    check_moments(torch.stack(parts))


def test_draws_repeat_with_a_generator_and_follow_dtype():
    first, second = (orthogonal_gaussian(9, 4, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    half = orthogonal_gaussian(9, 4, generator=seeded(3), dtype=torch.bfloat16)
    assert torch.equal(half, first.bfloat16())


def test_ones_own_draws_are_neither_the_weights_nor_the_stream():
    torch.manual_seed(0)
    weights = torch.randn(3, 4)
    before = torch.get_rng_state()
    draws = gaussian_rows(3, 4, False, own_generator(None))
    assert not torch.equal(draws, weights)
    assert torch.equal(torch.get_rng_state(), before)
    given = seeded(5)
    assert own_generator(given) is given
    assert torch.equal(
        gaussian_rows(3, 4, True, seeded(1)), orthogonal_gaussian(3, 4, generator=seeded(1))
    )


def test_a_module_without_a_generator_goes_where_the_context_asks_for():
    for generator, expected in ((None, "meta"), (seeded(), "cpu")):
        module = torch.nn.Linear(2, 2, device="cpu")
        with torch.device("meta"):
            settle(module, generator)
        assert module.weight.device.type == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthogonal_gaussian(4, 3, scaling="none"), "scaling must be one of .*got 'none'"),
        (lambda: orthogonal_gaussian(0, 3), "m must be at least 1, got 0"),
        (lambda: orthogonal_gaussian(3, 0), "d must be at least 1, got 0"),
        (
            lambda: gaussian_features(normal(2, 3), normal(2, 3), M=-0.1),
            r"M must be >= 0, got -0\.1",
        ),
        (
            lambda: gaussian_features(normal(2, 3), normal(2, 4)),
            r"z must be \(\.\.\., 4\), got shape",
        ),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_without_the_sign_have_the_lengths_of_gaussian_ones_but_a_mean():
    rows = unsigned_rows(4000, 2, seeded())
    assert rows.shape == (4000, 2)
    assert rows.norm(dim=1).square().mean() == pytest.approx(2, rel=0.1)
    signed = orthogonal_gaussian(4000, 2, generator=seeded())
    assert rows.mean(0).norm() > 0.4 > 0.1 > signed.mean(0).norm()


# ---------------------------------------------------------------- a linear model on features


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ridge_regression_is_the_formula_with_a_column_of_ones(dtype):
    H, Y = normal(30, 8).to(dtype), normal(30, 2, seed=1).to(dtype)
    V, bias = ridge_regression(H, Y, 0.2)
    H = torch.cat([H.double(), torch.ones(30, 1)], 1)
    penalty = 0.2 * torch.eye(9).double()
    penalty[8, 8] = 0
    expected = Y.double().T @ H @ torch.linalg.inv(H.T @ H + penalty)
    assert torch.allclose(V, expected[:, :8]) and torch.allclose(bias, expected[:, 8])


def test_ridge_regression_says_what_does_not_fit(plain_python):
    H = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="ridge must be positive and finite, got 0"):
        ridge_regression(H, H, 0.0)
    with pytest.raises(ValueError, match=r"Y must be \(3, l\), got shape \(4, 2\)"):
        ridge_regression(H, torch.zeros(4, 2))


# ---------------------------------------------------------------- digits and small networks


def test_digits_are_centred_of_length_one_and_split_class_by_class():
    x, labels, test_x, test_labels = unit_digits(0)
    assert x.shape == (1257, 64) and test_x.shape == (540, 64)
    lengths = torch.cat([x, test_x]).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(1797))
    share = labels.bincount() / torch.cat([labels, test_labels]).bincount()
    assert torch.allclose(share, torch.full((10,), 0.7), atol=0.01)
    assert torch.equal(unit_digits(0)[1], labels) and not torch.equal(unit_digits(1)[1], labels)


def test_a_small_network_learns_its_split_and_is_judged_on_the_rest():
    split = unit_digits(2)

    def build(seed):
        return learner(mlp(64, 16, 10), split, seed)

    arms = fit_arms({"mlp": build}, [0], evaluate=accuracy, steps=60, lr=1e-2, optimizer="adam")
    network = arms["mlp"][0].model.cpu()
    assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU", "Linear"]
    right = (network(split[2]).argmax(1) == split[3]).float().mean().item()
    assert arms.scores("mlp") == [pytest.approx(right)] and right > 0.7


def test_some_classes_keep_their_pictures_and_count_from_zero():
    split = unit_digits(0)
    low, high = some_classes(split, 0, 5), some_classes(split, 5, 5)
    for place in (0, 2):
        assert len(low[place]) + len(high[place]) == len(split[place])
        assert torch.equal(high[place], split[place][split[place + 1] >= 5])
        assert torch.equal(high[place + 1], split[place + 1][split[place + 1] >= 5] - 5)
    assert some_classes(split, 3, 2)[1].unique().tolist() == [0, 1]


def test_a_bottleneck_starts_as_identity_and_is_the_usual_adapter():
    adapter, x = Bottleneck(6, 3), torch.randn(2, 4, 6)
    assert torch.equal(adapter(x), x)
    torch.nn.init.normal_(adapter[2].weight)
    moved = adapter[0](x).relu() @ adapter[2].weight.T
    assert torch.allclose(adapter(x), x + moved, atol=1e-6)
