"""Bag-of-words superposition: the tied autoencoder, its closed form, what is measured."""

import math

import numpy as np
import pytest
import torch
from bags import as_sparse, random_bags, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.features import bag_of_words, bows
from shuffle_nb.features.bag_of_words import word_correlations
from shuffle_nb.features.bows import (
    TiedAutoencoder,
    circular_bow,
    feature_r2,
    figure8_bow,
    fit_autoencoder,
    gram_alignment,
    iid_bow,
    interference_stats,
    learning_rates,
    neighbour_order_score,
    one_hot_r2,
    pca_solution,
    preactivation_parts,
    same_topic_neighbours,
    sphere_bow,
)
from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.reference import load_reference


def random_model(n: int = 9, m: int = 4, relu: bool = True, dtype=torch.float64) -> TiedAutoencoder:
    model = TiedAutoencoder(n, m, relu, generator=seeded(n + m)).to(dtype)
    with torch.no_grad():
        model.weight.mul_(2)
        model.bias.uniform_(-0.2, 0.2, generator=seeded(1))
    return model


# ---------------------------------------------------------------- the set-up


def test_what_the_set_up_holds_is_found_here_too():
    names = ["bag_of_words", "circular_bow", "figure8_bow", "sphere_bow", "iid_bow"]
    names += ["shuffle_columns", "gram_alignment", "neighbour_order_score", "package_docstrings"]
    for name in names:
        assert getattr(bows, name) is getattr(bag_of_words, name)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(9,), (0, 9), (5, 9), (2, 3, 9)])
def test_model_is_the_formula_for_any_leading_shape(relu, shape):
    model, x = random_model(relu=relu), torch.rand(shape, dtype=torch.float64)
    z = x @ model.weight.T @ model.weight + model.bias
    expected = z.clamp(min=0) if relu else z
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert torch.equal(model(x), model.decode(model.encode(x)))


def test_parameters_and_initial_bounds():
    for init, bound in (("kaiming", math.sqrt(2 / 300)), ("linear", 1 / math.sqrt(300))):
        model = TiedAutoencoder(300, 40, init=init, generator=seeded())
        assert sum(p.numel() for p in model.parameters()) == 40 * 300 + 300
        assert 0.99 * bound < model.weight.abs().max() <= bound
        assert not model.bias.any()
        again = TiedAutoencoder(300, 40, init=init, generator=seeded())
        assert torch.equal(model.weight, again.weight)


def test_initial_bounds_are_those_of_pytorch():
    torch.manual_seed(0)
    ours = TiedAutoencoder(30, 5)
    torch.manual_seed(0)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(5, 30), a=2**0.5)
    assert torch.allclose(ours.weight, theirs)
    torch.manual_seed(0)
    ours = TiedAutoencoder(30, 5, init="linear")
    torch.manual_seed(0)
    assert torch.allclose(ours.weight, torch.nn.Linear(30, 5, bias=False).weight)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 14))
def test_gram_is_symmetric_positive_and_of_low_rank(n, m):
    gram = random_model(n, m).gram()
    assert torch.allclose(gram, gram.T)
    values = torch.linalg.eigvalsh(gram)
    assert values.min() > -1e-9
    assert (values > 1e-9 * values.max()).sum() <= m


@settings(deadline=None)
@given(st.integers(2, 10), st.integers(1, 6), st.booleans())
def test_rotating_the_latent_changes_nothing(n, m, relu):
    model, turned = random_model(n, m, relu), random_model(n, m, relu)
    rotation = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q
    with torch.no_grad():
        turned.weight.copy_(rotation @ model.weight)
    x = random_bags(n=n)
    assert torch.allclose(turned.gram(), model.gram(), atol=1e-12)
    assert torch.allclose(turned(x), model(x), atol=1e-12)
    for name, part in preactivation_parts(model, x).items():
        assert torch.allclose(preactivation_parts(turned, x)[name], part, atol=1e-12)


@pytest.mark.parametrize("relu", [True, False])
def test_gradients(relu):
    model, x = random_model(6, 3, relu), torch.rand(4, 6, dtype=torch.float64)

    def output(weight, bias, x):
        state = {"weight": weight, "bias": bias}
        return torch.func.functional_call(model, state, (x,))

    inputs = [model.weight.detach(), model.bias.detach(), x]
    inputs = [value.clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(output, inputs)


def test_sparse_batches_are_encoded_like_dense_ones():
    model, x = random_model(dtype=torch.float32), random_bags(dtype=torch.float32)
    assert torch.allclose(model(as_sparse(x)), model(x), atol=1e-6)


def test_a_training_step_costs_ten_b_m_n():
    model, x = TiedAutoencoder(40, 8), torch.rand(16, 40)
    assert count_flops(model, x) == 4 * 16 * 8 * 40
    assert count_flops(model, x, backward=True) == 10 * 16 * 8 * 40


@pytest.mark.usefixtures("plain_python")
def test_compiled_without_graph_breaks_and_under_autocast():
    model, x = random_model(dtype=torch.float32), random_bags(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert torch.allclose(model(x), random_model(dtype=torch.float32)(x))


def test_state_dict_round_trip():
    model, other = random_model(), TiedAutoencoder(9, 4).double()
    assert list(model.state_dict()) == ["weight", "bias"]
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(random_bags()), other(random_bags()))


# ---------------------------------------------------------------- training


def test_decay_is_decoupled_and_shrinks_the_bias_too():
    X = torch.zeros(4, 6)  # with W = 0 contribution only: x = 0 gives no gradient at b < 0
    model = TiedAutoencoder(6, 2, generator=seeded())
    with torch.no_grad():
        model.bias.fill_(-1.0)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=4.0, fused=True)
    (model(X) - X).square().mean().backward()
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.step()
    for parameter, before in zip(model.parameters(), start, strict=True):
        assert torch.allclose(parameter, before * (1 - 0.01 * 4.0), rtol=1e-6, atol=0)


def test_fit_decays_weight_and_bias_when_there_is_nothing_to_learn():
    # No word ever occurs, and the ReLU output is 0 at b = 0: the gradient is zero at every step.
    model, losses = fit_autoencoder(torch.zeros(8, 5), 3, weight_decay=2.0, lr=0.1, steps=3)
    start = TiedAutoencoder(5, 3, generator=seeded(0)).weight
    factor = math.prod(1 - 2.0 * rate for rate in learning_rates(0.1, 3, 1))
    assert losses == [0, 0, 0]
    assert torch.allclose(model.weight, start * factor, rtol=1e-5)


def test_learning_rates():
    assert learning_rates(1.0, 3, 1, "constant") == [1, 1, 1]
    assert learning_rates(2.0, 4, 1, "cosine") == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    for schedule, per_epoch in (("cosine", 1), ("cosine-epoch", 3)):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([parameter], lr=0.01)
        floor = 1e-9 if schedule == "cosine-epoch" else 0.0
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12 // per_epoch, floor)
        expected = []
        for _ in range(12 // per_epoch):
            expected += per_epoch * [optimizer.param_groups[0]["lr"]]
            optimizer.step(), cosine.step()
        assert learning_rates(0.01, 12, per_epoch, schedule) == pytest.approx(expected, rel=1e-9)


def test_fit_is_repeatable_and_leaves_the_global_stream_alone():
    X, state = circular_bow(200), torch.get_rng_state()
    options = dict(lr=1e-2, batch=64, clip=1.0)
    first, losses = fit_autoencoder(X, 3, epochs=2, seed=5, **options)
    second, again = fit_autoencoder(X, 3, steps=8, seed=5, **options)  # 4 batches an epoch
    other, _ = fit_autoencoder(X, 3, steps=8, seed=6, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(losses) == 8 and losses == again
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert len(fit_autoencoder(X, 3, batch=200)[1]) == 10  # ten epochs, if nothing is said


def test_fit_is_the_plain_loop():
    X = circular_bow(100)
    model, losses = fit_autoencoder(X, 3, weight_decay=1.0, lr=1e-2, steps=5, batch=40, clip=0.1)
    generator = seeded(0)
    plain = TiedAutoencoder(12, 3, generator=generator)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    batches = [
        part for _ in range(2) for part in torch.randperm(100, generator=generator).split(40)
    ]
    for step in range(5):
        loss = (plain(X[batches[step]]) - X[batches[step]]).square().mean()
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step(), cosine.step()
    assert torch.allclose(model.weight, plain.weight, atol=1e-6)
    assert torch.allclose(model.bias, plain.bias, atol=1e-6)


def test_sparse_and_dense_data_train_the_same_model():
    X = circular_bow(90)
    X[7] = 0  # an empty row
    dense, losses = fit_autoencoder(X, 3, steps=7, batch=20)
    sparse, again = fit_autoencoder(as_sparse(X), 3, steps=7, batch=20)
    assert losses == again and torch.equal(dense.weight, sparse.weight)


def test_many_words_are_read_sparsely_and_give_the_same_model(monkeypatch):
    X = (torch.rand(60, 2100, generator=seeded()) < 0.02).float()
    X[7] = 0  # an empty row
    for loss in ("mse", "bce"):
        choice = dict(steps=6, batch=20, lr=1e-3, loss=loss)
        dense, losses = fit_autoencoder(X, 3, **choice)
        with monkeypatch.context() as patch:
            patch.setattr(bows, "_dense_loss", None)
            sparse, again = fit_autoencoder(as_sparse(X), 3, **choice)
        assert losses == pytest.approx(again, rel=1e-5)
        assert torch.allclose(dense.weight, sparse.weight, atol=1e-4)
        assert sparse.weight.is_contiguous()


def test_an_untied_decoder_starts_as_a_copy_and_goes_its_own_way():
    X = circular_bow(200)
    tied, untied = (TiedAutoencoder(12, 3, generator=seeded(), tied=tied) for tied in (True, False))
    assert torch.equal(tied(X), untied(X))
    assert sum(p.numel() for p in untied.parameters()) == 2 * 36 + 12
    model, losses = fit_autoencoder(X, 3, tied=False, lr=1e-2, steps=20, batch=50)
    assert losses[-1] < losses[0] and not torch.equal(model.weight, model.decoder)
    with torch.no_grad():
        parts = preactivation_parts(model, X)
        whole = sum(parts.values())
        assert torch.allclose(parts["self"], X * model.gram().diagonal(), atol=1e-5)
        assert torch.allclose(whole.relu(), model(X), atol=1e-5)
        assert torch.allclose(whole, X @ model.gram().T + model.bias, atol=1e-5)
        assert interference_stats(model, X)["self"] == pytest.approx(
            model.gram().diagonal().mean().item(), abs=1e-5
        )


def test_cross_entropy_is_that_of_the_logits():
    X = circular_bow(64)
    model, losses = fit_autoencoder(X, 3, loss="bce", steps=1, batch=64)
    start = TiedAutoencoder(12, 3, generator=seeded(0))
    z = X @ start.weight.T @ start.weight
    expected = torch.nn.functional.binary_cross_entropy(z.sigmoid(), X)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert not model.relu


def test_as_many_dimensions_as_words_lose_nothing():
    X = circular_bow(2000)
    options = dict(lr=1e-2, epochs=60, batch=256, init="linear", schedule="cosine-epoch")
    _, losses = fit_autoencoder(X, 12, relu=False, **options)
    assert losses[-1] < 1e-3
    assert pca_solution(X.double(), 12)[2] < 1e-10


def test_a_loss_that_is_not_finite_is_an_error():
    X = torch.full((8, 4), 1e25)
    with pytest.raises(FloatingPointError, match="lr below"):
        fit_autoencoder(X, 2, lr=1e30, steps=4, schedule="constant")


# ---------------------------------------------------------------- the closed form


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 5))
def test_pca_reaches_its_loss_and_no_linear_model_does_better(n, m, seed):
    m = min(m, n)
    X = torch.rand(50, n, dtype=torch.float64, generator=seeded(seed))
    W, b, smallest = pca_solution(X, m)
    assert W.shape == (m, n)
    assert torch.allclose(W @ W.T, torch.eye(m, dtype=torch.float64), atol=1e-10)
    assert (X @ W.T @ W + b - X).square().mean().item() == pytest.approx(smallest, abs=1e-10)
    for scale in (0.01, 1.0):
        noise = scale * torch.randn(m, n, dtype=torch.float64, generator=seeded(seed))
        other, shift = W + noise, X.mean(0) - X.mean(0) @ (W + noise).T @ (W + noise)
        assert (X @ other.T @ other + shift - X).square().mean().item() >= smallest - 1e-12


def test_pca_without_dimensions_is_the_mean_and_with_all_is_exact():
    X = random_bags()
    W, b, loss = pca_solution(X, 0)
    assert W.shape == (0, 9) and torch.allclose(b, X.mean(0))
    assert loss == pytest.approx(X.var(0, correction=0).mean().item())
    assert pca_solution(X, 9)[2] < 1e-10
    for found, expected in zip(pca_solution(as_sparse(X), 4), pca_solution(X, 4), strict=True):
        assert torch.allclose(torch.as_tensor(found), torch.as_tensor(expected))


def test_pca_puts_the_population_circle_on_a_regular_polygon():
    angles = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    chances = (10 * torch.cos(angles[:, None] - angles)).sigmoid()
    covariance = (chances.T @ chances / 12 - 0.25).fill_diagonal_(0.25)
    W = torch.linalg.eigh(covariance).eigenvectors[:, -2:].T
    expected = torch.cos(angles[:, None] - angles) / 6
    assert torch.allclose(W.T @ W, expected, atol=1e-10)
    assert neighbour_order_score(W) == 1
    assert neighbour_order_score(pca_solution(circular_bow(2000), 2)[0]) == 1


def test_a_trained_linear_model_comes_close_to_pca_and_never_below():
    X = circular_bow(500)
    model, _ = fit_autoencoder(X, 2, relu=False, lr=1e-2, epochs=60, batch=100)
    loss, smallest = (model(X) - X).square().mean().item(), pca_solution(X, 2)[2]
    assert smallest - 1e-6 <= loss < 1.02 * smallest


# ---------------------------------------------------------------- what is measured


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**12 - 1))
def test_the_three_parts_are_the_preactivation(n, m, bits):
    model = random_model(n, m, dtype=torch.float32)
    x = torch.tensor([float(bits >> i & 1) for i in range(n)])
    with torch.no_grad():
        parts = preactivation_parts(model, x)
        gram = model.gram()
    assert list(parts) == ["self", "interference", "bias"]
    assert torch.allclose(sum(parts.values()), gram @ x + model.bias, atol=1e-6)
    assert torch.allclose(parts["self"], gram.diagonal() * x, atol=1e-6)
    others = torch.stack([sum(gram[i, j] * x[j] for j in range(n) if j != i) + 0 * x[0]
                          for i in range(n)])  # fmt: skip
    assert torch.allclose(parts["interference"], others, atol=1e-6)


def test_a_word_alone_meets_no_interference():
    one_hot = torch.eye(9, dtype=torch.float64)
    parts = preactivation_parts(random_model(), one_hot)
    assert parts["interference"].diagonal().abs().max() < 1e-6
    assert torch.equal(parts["bias"], random_model().bias.expand(9, 9))


@pytest.mark.parametrize("make", [torch.clone, as_sparse])
def test_interference_stats_are_means_over_words_of_means_over_samples(make):
    model, X = random_model(), random_bags(5000)
    X[:, 0], X[:, 1] = 0, 0
    X[:9, 1] = 1  # one sample short of ten
    X[:, 2] = 1  # always there: no inactive samples
    with torch.no_grad():
        found = interference_stats(model, make(X))
        others = preactivation_parts(model, X)["interference"]
    words = range(2, 9)
    active = [others[X[:, i] == 1, i] for i in words]
    absent = [others[X[:, i] == 0, i] for i in words if i != 2]
    expected = {
        "active": np.mean([a.mean() for a in active]),
        "inactive": np.mean([a.mean() for a in absent]),
        "positive_share": np.mean([(a > 0).double().mean() for a in active]),
        "positive_share_inactive": np.mean([(a > 0).double().mean() for a in absent]),
        "self": model.gram().diagonal()[2:].mean().item(),
        "bias": model.bias[2:].mean().item(),
    }
    assert found == pytest.approx(expected, abs=1e-9)
    nine = interference_stats(model, X, min_active=9)  # now the second word counts
    assert nine["bias"] == pytest.approx(model.bias[1:].mean().item(), abs=1e-9)


@pytest.mark.parametrize("make", [torch.clone, as_sparse])
def test_r2_of_each_word(make):
    from sklearn.metrics import r2_score

    model, X = random_model(), random_bags(5000)
    X[:, 4] = 1
    with torch.no_grad():
        predicted = model(X)
    found = feature_r2(model, make(X))
    assert found[4].isnan() and found.isnan().sum() == 1
    varying = torch.arange(9) != 4
    expected = r2_score(X[:, varying], predicted[:, varying], multioutput="raw_values")
    assert found[varying].tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_r2_of_words_that_come_alone():
    model = random_model()
    found, expected = one_hot_r2(model), feature_r2(model, torch.eye(9, dtype=torch.float64))
    assert torch.allclose(found, expected)
    with torch.no_grad():
        by_hand = (model.gram() + model.bias).clamp(min=0)  # row s: word s comes alone
    residual = (by_hand - torch.eye(9)).square().sum(0)
    assert torch.allclose(found, 1 - residual / (1 - 1 / 9))
    assert one_hot_r2(TiedAutoencoder(1, 1)).isnan().all()


def test_interference_is_constructive_on_the_circle_and_not_for_independent_words():
    options = dict(lr=1e-2, epochs=30, batch=256, clip=1.0, init="linear")
    circle, coins = circular_bow(1000), iid_bow(1000, p=0.5)
    found = {}
    for name, X in (("circle", circle), ("independent", coins)):
        model, _ = fit_autoencoder(X, 2, **options)
        found[name] = interference_stats(model, X)
    helped = {name: stats["active"] - stats["inactive"] for name, stats in found.items()}
    assert helped["circle"] > 0.5 and abs(helped["independent"]) < 0.05
    assert found["circle"]["inactive"] < 0 < found["circle"]["active"]


# ---------------------------------------------------------------- bad input

MODEL = TiedAutoencoder(4, 2)
TWO = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]])


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: TiedAutoencoder(4, 0), "m must be at least 1, got 0"),
            (lambda: TiedAutoencoder(0, 1), "n must be at least 1, got 0"),
            (lambda: TiedAutoencoder(4, 2, init="normal"), "'kaiming', 'linear'.*'normal'"),
            (lambda: MODEL(torch.zeros(3, 5)), r"x must be \(\.\.\., 4\), got shape \(3, 5\)"),
            (lambda: preactivation_parts(MODEL, torch.zeros(3)), r"x must be \(\.\.\., 4\)"),
            (lambda: fit_autoencoder(TWO, 0), "m must be at least 1"),
            (lambda: fit_autoencoder(TWO, 2, steps=1, epochs=1), "not both"),
            (lambda: fit_autoencoder(TWO, 2, steps=0), "at least 1, got 0"),
            (lambda: fit_autoencoder(TWO, 2, epochs=0), "at least 1"),
            (lambda: fit_autoencoder(TWO, 2, batch=0), "batch must be at least 1"),
            (lambda: fit_autoencoder(TWO, 2, schedule="step"), "'cosine-epoch'.*'step'"),
            (lambda: fit_autoencoder(TWO, 2, loss="l1"), "'mse', 'bce'.*'l1'"),
            (lambda: fit_autoencoder(TWO.long(), 2), "floats, got torch.int64"),
            (lambda: fit_autoencoder(TWO[0], 2), r"shape \(4,\)"),
            (lambda: fit_autoencoder(TWO[:0], 2), r"shape \(0, 4\)"),
            (lambda: pca_solution(TWO, 5), r"m must be in 0\.\.4, got 5"),
            (lambda: pca_solution(TWO, -1), "got -1"),
            (lambda: interference_stats(MODEL, TWO), "active in 10 of the 2 samples"),
            (lambda: feature_r2(MODEL, torch.zeros(3, 5)), r"x must be \(\.\.\., 4\)"),
            (lambda: neighbour_order_score(torch.eye(2)), "n >= 3"),
            (lambda: same_topic_neighbours(TWO, torch.zeros(3).long()), r"topics must be \(4\)"),
            (lambda: same_topic_neighbours(TWO, torch.zeros(4).long(), k=4), r"1\.\.3, got 4"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- the authors' own numbers


def load_model(case, relu=True):
    weight = case.tensors["weight"]
    model = TiedAutoencoder(weight.shape[1], weight.shape[0], relu).double()
    model.load_state_dict({name: case.tensors[name] for name in ("weight", "bias")})
    return model


def descend(model, case, batches, rates):
    """Take one AdamW step a batch; return the losses."""
    decay = case.settings["weight_decay"]
    optimizer, losses = torch.optim.AdamW(model.parameters(), weight_decay=decay), []
    for (first, last), rate in zip(batches, rates, strict=True):
        x = case.tensors["x"][first:last]
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        if "clip" in case.settings:
            torch.nn.utils.clip_grad_norm_(model.parameters(), case.settings["clip"])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def synthetic_recipe(case):
    model, s = load_model(case), case.settings
    with torch.no_grad():
        output = model(case.tensors["x"])
    batches = s["epochs"] * s["batches"]
    rates = learning_rates(s["lr"], len(batches), len(s["batches"]), s["schedule"])
    losses = descend(model, case, batches, rates)
    return {
        "output": output,
        "loss of each epoch (mean over its batches)": losses.view(s["epochs"], -1).mean(1),
        "weight afterwards": model.weight,
        "bias afterwards": model.bias,
        "gram afterwards": model.gram(),
    }


def generators(case):
    s = case.settings
    found = {
        name: draw(samples, n, sharpness, log_odds, noise, seed)
        for name, draw in (
            ("circular", circular_bow),
            ("figure8", figure8_bow),
            ("sphere", sphere_bow),
        )
        for samples, n, sharpness, log_odds, noise, seed in [s[name]]
    }
    return found | {"iid": iid_bow(*s["iid"])}


def text_recipe(case):
    model, s = load_model(case), case.settings
    linear = load_model(case, relu=False)
    rates = learning_rates(s["lr"], s["steps"], 3, s["schedule"])
    losses = descend(model, case, s["batches"], rates)
    linear.load_state_dict(model.state_dict())
    return {
        "losses": losses,
        "weight afterwards": model.weight,
        "bias afterwards": model.bias,
        "feature_r2": feature_r2(model, case.tensors["x"]),
        "one_hot_r2": one_hot_r2(model),
        "output of the linear model": linear(case.tensors["x"]),
    }


@torch.no_grad()
def measurements(case):
    model, x = load_model(case), case.tensors["x"]
    parts = preactivation_parts(model, x)
    stats = interference_stats(model, x, min_active=case.settings["min_active"])
    W, b, loss = pca_solution(x, 2)
    keys = "active, inactive, positive_share, positive_share_inactive, self, bias"
    return {
        "self": parts["self"],
        "interference": parts["interference"],
        f"stats: {keys}": torch.tensor(
            [stats[key] for key in keys.split(", ")], dtype=torch.float64
        ),
        "PCA W^T W": W.T @ W,
        "PCA b": b,
        "PCA loss": torch.tensor(loss, dtype=torch.float64),
        "correlations": word_correlations(x),
        "alignment": gram_alignment(model.gram(), word_correlations(x)),
        "neighbour order score": neighbour_order_score(model.weight),
    }


RECOMPUTE = {
    "tied ReLU autoencoder, synthetic recipe": synthetic_recipe,
    "generators without noise": generators,
    "text recipe: four steps with decay 4, then R squared": text_recipe,
    "interference, PCA, geometry": measurements,
}


@pytest.mark.parametrize("case", [*load_reference("bows")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
