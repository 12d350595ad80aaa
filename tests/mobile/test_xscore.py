"""xScore: scales, scores, rankings, subsets, the networks, the benchmark."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import stats

from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.mobile import xscore as paper
from shuffle_nb.mobile.micro_zoo import scaled_zoo, zoo_variants
from shuffle_nb.mobile.seven_domains import public_suite
from shuffle_nb.mobile.xscore import (
    best_subset,
    bootstrap_xscore,
    count_parameters,
    cross_dataset_suite,
    measured_table,
    micro_zoo,
    normalize_accuracy,
    pairwise_dataset_correlation,
    rank_correlation,
    rank_models,
    run_benchmark,
    subset_analysis,
    train_and_test,
    xscore,
)

ALL = ["max", "minmax", "zscore", "rank", "chance", "none"]
SMALL = settings(deadline=None, max_examples=40)
TABLES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 6), st.integers(1, 5)),
    elements=st.integers(1, 1000).map(lambda n: n / 1000),
).map(torch.from_numpy)
PENALTIES = st.sampled_from([0.0, 0.5, 1.0, 2.5])
HAND = torch.tensor([[0.9, 0.5], [0.6, 0.5]], dtype=torch.float64)


def table(models=8, datasets=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(models, datasets, generator=generator, dtype=torch.float64) * 0.9 + 0.05


def close(a, b, atol=1e-9):
    return torch.allclose(a, b, atol=atol)


# ---------------------------------------------------------------- the score


def test_by_hand():
    relative = normalize_accuracy(HAND)
    assert close(relative, torch.tensor([[1, 1], [2 / 3, 1]]).double())
    assert xscore(HAND).tolist() == pytest.approx([1, 2 / 3])


@SMALL
@given(TABLES, PENALTIES)
def test_best_everywhere_scores_one_and_nobody_more(acc, penalty):
    acc = torch.cat([acc, acc.amax(0, keepdim=True)])
    scores = xscore(acc, penalty)
    assert scores[-1] == 1 and (scores <= 1).all()


@SMALL
@given(TABLES, PENALTIES, st.randoms())
def test_scale_and_order_do_not_matter(acc, penalty, random):
    models, datasets = acc.shape
    scores = xscore(acc, penalty)
    factors = torch.linspace(0.3, 1, datasets, dtype=torch.float64)
    assert close(xscore(acc * factors, penalty), scores)
    columns = random.sample(range(datasets), datasets)
    rows = random.sample(range(models), models)
    for method in ("max", "minmax", "zscore", "rank", "none"):
        scores = xscore(acc, penalty, method)
        assert close(xscore(acc[:, columns], penalty, method), scores)
        assert close(xscore(acc[rows], penalty, method), scores[rows])
        assert close(xscore(acc.repeat(1, 3), penalty, method), scores)  # every set twice more


@SMALL
@given(TABLES)
def test_the_penalty_only_lowers(acc):
    assert close(xscore(acc, 0, "none"), acc.mean(1))
    for method in ("max", "minmax", "zscore", "rank", "none"):
        scores = torch.stack([xscore(acc, penalty, method) for penalty in (0, 0.5, 1, 3)])
        assert (scores.diff(dim=0) <= 1e-12).all()
    assert close(xscore(acc[:, :1], 5), xscore(acc[:, :1], 0))  # one set: no spread
    even = torch.linspace(0.2, 0.9, len(acc), dtype=torch.float64)[:, None].expand(-1, 4)
    assert close(xscore(even, 3), xscore(even, 0))


@SMALL
@given(TABLES, PENALTIES)
def test_more_accuracy_below_the_own_mean_never_harms(acc, penalty):
    relative = normalize_accuracy(acc)
    raised = relative.clone()
    raised[0, 0] = torch.maximum(relative[0, 0], relative[0].mean())
    before, after = (paper.level_minus_spread(r[0], penalty) for r in (relative, raised))
    assert after >= before - 1e-12


def test_what_is_not_monotone():
    relative = torch.tensor([0.5, 0.5, 0.5, 0.9]).double()
    raised = torch.tensor([0.5, 0.5, 0.5, 1.0]).double()
    assert paper.level_minus_spread(raised) < paper.level_minus_spread(relative)
    acc = torch.tensor([[0.6, 0.6], [0.5, 0.6]])
    higher = torch.tensor([[0.9, 0.6], [0.5, 0.6]])
    assert xscore(higher)[1] < xscore(acc)[1]  # the best rises, the other's score falls


@pytest.mark.parametrize("method", ALL)
def test_every_scale_against_numpy(method):
    acc, classes = table(6, 5), [2, 10, 3, 4, 7]
    a, chance = acc.numpy(), 1 / np.array(classes)
    low, high = a.min(0), a.max(0)
    expected = {
        "max": a / high,
        "minmax": (a - low) / (high - low),
        "zscore": (a - a.mean(0)) / a.std(0),
        "rank": (stats.rankdata(a, axis=0) - 1) / 5,
        "chance": (a - chance) / (1 - chance),
        "none": a,
    }[method]
    found = normalize_accuracy(acc, method, classes)
    assert np.allclose(found, expected)
    scores = expected.mean(1) - 0.7 * expected.std(1)
    assert np.allclose(xscore(acc, 0.7, method, classes), scores)


def test_a_number_of_classes_for_all():
    acc = table()
    assert torch.equal(
        normalize_accuracy(acc, "chance", 4), normalize_accuracy(acc, "chance", [4] * 7)
    )


def test_constant_columns_and_one_model():
    acc = torch.full((3, 2), 0.1).double()
    assert (normalize_accuracy(acc, "minmax") == 1).all()
    assert (normalize_accuracy(acc, "zscore") == 0).all()
    assert (normalize_accuracy(acc, "rank") == 0.5).all()
    assert xscore(torch.tensor([[0.3, 0.8]])).item() == 1
    assert (normalize_accuracy(torch.zeros(2, 2), "none") == 0).all()


def test_tables_of_any_kind():
    expected = xscore(HAND)
    for acc in (HAND.tolist(), HAND.numpy(), pd.DataFrame(HAND.numpy()), HAND.T.contiguous().T):
        assert torch.equal(xscore(acc), expected)
    assert not HAND.T.contiguous().T.is_contiguous()
    assert xscore([[1, 1], [0, 1]]).dtype == torch.float64
    assert xscore(HAND.float()).dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16):
        half = xscore(HAND.to(dtype))
        assert half.dtype == torch.float32 and close(half.double(), expected, 5e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(xscore(HAND), expected)


@pytest.mark.parametrize("method", ALL)
def test_one_graph(method, plain_python):
    def scored(acc):
        return xscore(acc, 1.0, method, 3)

    compiled, acc = torch.compile(scored, fullgraph=True, backend="aot_eager"), table()
    assert close(compiled(acc), scored(acc))


def test_gradients():
    acc = table(4, 3).requires_grad_()
    for method in ("max", "minmax", "zscore", "chance", "none"):
        assert torch.autograd.gradcheck(lambda acc, m=method: xscore(acc, 0.5, m, 5), acc)
    even = torch.full((2, 3), 0.5, requires_grad=True)
    xscore(even).sum().backward()
    assert even.grad.isfinite().all()  # no spread: still a slope


# ---------------------------------------------------------------- rankings


@SMALL
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=9),
    st.sampled_from(["spearman", "kendall"]),
)
def test_rank_correlation_is_scipys(pairs, method):
    a, b = np.array(pairs, float).T
    test = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}[method]
    constant = len(set(a)) == 1 or len(set(b)) == 1
    expected = 0.0 if constant else test(a, b).statistic
    assert rank_correlation(torch.tensor(a), torch.tensor(b), method) == pytest.approx(expected)
    assert rank_correlation(list(a), list(b), method) == pytest.approx(expected)


def test_models_are_ranked_best_first_and_stable():
    assert rank_models(torch.tensor([0.2, 0.9, 0.2, 0.9, 0.5])).tolist() == [1, 3, 4, 0, 2]
    assert rank_models([0.1, 0.3]).tolist() == [1, 0]
    assert rank_models(torch.zeros(0)).tolist() == []


def test_pairs_of_datasets():
    acc = table()
    acc[:, 2] = 0.4
    found = pairwise_dataset_correlation(acc)
    for i, j in itertools.product(range(7), repeat=2):
        constant = 2 in (i, j)
        expected = 0 if constant else stats.spearmanr(acc[:, i], acc[:, j]).statistic
        assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- subsets


def by_loops(acc, k, penalty, against):
    """One subset after the other, with NumPy and SciPy."""
    relative = acc.numpy() / acc.numpy().max(0)

    def score(columns):
        part = relative[:, columns]
        return np.round(part.mean(1) - penalty * part.std(1), 12)

    found = []
    for subset in itertools.combinations(range(acc.shape[1]), k):
        rest = [d for d in range(acc.shape[1]) if d not in subset]
        other = list(range(acc.shape[1])) if against == "all" else rest
        found.append((subset, stats.spearmanr(score(list(subset)), score(other)).statistic))
    return found


@pytest.mark.parametrize("against", ["all", "complement"])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_subsets_against_loops(against, penalty):
    acc = table(6, 5)
    records = subset_analysis(acc, penalty=penalty, against=against)
    sizes = range(1, 6) if against == "all" else range(1, 5)
    expected = [pair for k in sizes for pair in by_loops(acc, k, penalty, against)]
    assert [record["subset"] for record in records] == [subset for subset, _ in expected]
    assert all(record["k"] == len(record["subset"]) for record in records)
    rhos = [rho for _, rho in expected]
    assert [record["rho"] for record in records] == pytest.approx(rhos)


def test_how_many_subsets_and_the_whole():
    records = subset_analysis(table())
    assert len(records) == 2**7 - 1 and sum(r["k"] == 4 for r in records) == 35
    assert records[-1] == {"k": 7, "subset": tuple(range(7)), "rho": pytest.approx(1)}
    assert {record["k"] for record in subset_analysis(table(), [2, 5])} == {2, 5}


def test_complements_are_symmetric():
    rhos = {r["subset"]: r["rho"] for r in subset_analysis(table(), against="complement")}
    for subset, rho in rhos.items():
        rest = tuple(d for d in range(7) if d not in subset)
        assert rhos[rest] == pytest.approx(rho)


def test_a_subset_does_not_depend_on_the_order_of_the_sets():
    acc = table().round(decimals=2)
    order = torch.randperm(7)
    before = {r["subset"]: r["rho"] for r in subset_analysis(acc)}
    for record in subset_analysis(acc[:, order]):
        there = tuple(sorted(order[list(record["subset"])].tolist()))
        assert record["rho"] == pytest.approx(before[there])


def test_the_best_subset_is_the_first_of_the_best():
    subset, rho = best_subset(table(), 4)
    rhos = {r["subset"]: r["rho"] for r in subset_analysis(table(), [4])}
    assert rho == pytest.approx(max(rhos.values())) and rhos[subset] == rho
    same = torch.tensor([[0.9] * 4, [0.4] * 4])
    assert best_subset(same, 2) == ((0, 1), pytest.approx(1.0))


def test_bootstrap_draws_datasets():
    acc = table()
    scores = bootstrap_xscore(acc, n=200, seed=5)
    assert scores.shape == (8, 200) and torch.equal(scores, bootstrap_xscore(acc, 200, 5))
    draw = np.random.default_rng(5).integers(0, 7, (200, 7))[17]
    relative = normalize_accuracy(acc)
    assert close(scores[:, 17], paper.level_minus_spread(relative[:, draw]))
    even = acc[:, :1].expand(-1, 7)
    assert close(bootstrap_xscore(even, 50), xscore(even)[:, None].expand(-1, 50))


# ---------------------------------------------------------------- the benchmark


def test_a_benchmark_is_a_table_and_repeats():
    suite = cross_dataset_suite(0, 60, 40)
    suite = {name: suite[name] for name in ("textures", "faces")}
    zoo = {name: micro_zoo()[name] for name in ("mlp", "depthwise")}
    before = torch.get_rng_state()
    found = run_benchmark(zoo, suite, [0, 1], updates=3, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.shape == (2, 2, 2) and ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found, run_benchmark(zoo, lambda seed: suite, [0, 1], 3, device="cpu"))
    alone = train_and_test(zoo["mlp"][0], suite["faces"], 1, updates=3, device="cpu")
    assert alone == found[1, 0, 1]


def test_all_networks_get_the_same_recipe(monkeypatch):
    recipes = []

    def record(*parts, **options):
        recipes.append([options[name] for name in ("steps", "weight_decay", "schedule", "lr")])

    monkeypatch.setattr(paper, "fit", record)
    suite = cross_dataset_suite(0, 120, 40)
    run_benchmark({"mlp": micro_zoo()["mlp"]}, suite, [0], device="cpu")
    assert recipes == [[60, 0.01, "one-cycle", 6e-3]] * 7  # as many for 100 images as for 120


def test_a_network_learns_and_labels_at_random_teach_nothing():
    x, y, x_test, y_test = cross_dataset_suite(0, 300, 300)["textures"]
    build = micro_zoo()["plain-pyramid"][0]
    assert train_and_test(build, (x, y, x_test, y_test), 0, device="cpu") > 0.7
    mixed = y[torch.randperm(len(y))]
    assert train_and_test(build, (x, mixed, x_test, y_test), 0, device="cpu") < 0.6


def test_the_stored_table(tmp_path):
    measured = measured_table()
    assert measured.accuracy.shape == (
        len(measured.seeds),
        len(measured.networks),
        len(measured.datasets),
    )
    assert list(measured.datasets) == list(cross_dataset_suite(0, 1, 1))
    assert measured.networks == [*micro_zoo(), *zoo_variants()]
    path = tmp_path / "copy.csv"
    measured.write(path)
    assert path.read_text() == paper.STORED.read_text()
    again = measured_table(path)
    assert torch.equal(again.accuracy, measured.accuracy) and again.seeds == measured.seeds
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(ValueError, match="must hold every network with every seed"):
        measured_table(path)


def folder(place, labels=("a", "b", "c"), each=4):
    """Pictures in the format that Hugging Face datasets reads: split/label/name.png."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in labels:
            (place / split / label).mkdir(parents=True)
            for number in range(each):
                pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / split / label / f"{number}.png")
    return str(place)


def test_full_scale_on_local_folders(tmp_path):
    pytest.importorskip("datasets")
    names = [folder(tmp_path / name) for name in ("flowers", "x-rays")]
    suite = public_suite(names, side=8)
    x, y, x_test, _ = suite[names[0]]
    assert x.shape == (12, 3, 8, 8) and x_test.shape == (12, 3, 8, 8)
    assert y.unique().tolist() == [0, 1, 2] and abs(x.mean()) < 1e-5
    zoo = scaled_zoo(target=100_000, side=8)
    zoo = {name: zoo[name] for name in ("mlp", "transformer")}
    assert abs(count_parameters(zoo["mlp"][0](3)) / 100_000 - 1) < 0.05
    assert run_benchmark(zoo, suite, [0], updates=2, device="cpu").shape == (1, 2, 2)


# ---------------------------------------------------------------- reference values


def of_scores(case):
    acc, settings_ = case.tensors["acc"], case.settings
    classes = settings_["num_classes"]
    found = {f"normalised, {m}": normalize_accuracy(acc, m, classes) for m in settings_["methods"]}
    for method, penalty in itertools.product(settings_["methods"], settings_["penalties"]):
        found[f"xscore, {method}, penalty {penalty}"] = xscore(acc, penalty, method, classes)
    return found


def of_odd(case):
    acc = case.tensors["acc"]
    found = {f"normalised, {m}": normalize_accuracy(acc, m) for m in case.settings["methods"]}
    found["xscore of the second dataset alone, penalty 2"] = xscore(acc[:, 1:2], 2)
    return found


def of_correlations(case):
    a, b, constant = case.tensors["a"], case.tensors["b"], torch.ones(6).double()
    pairs = pairwise_dataset_correlation(case.tensors["acc"])
    found = {"pairwise spearman of the columns": pairs}
    for method in ("spearman", "kendall"):
        found[method] = np.array([rank_correlation(a, b, method)])
        with_constant = rank_correlation(a, constant, method)
        found[f"{method} with a constant"] = np.array([with_constant])
    return found


def of_subsets(case):
    acc, penalty = case.tensors["acc"], case.settings["penalty"]
    scores = xscore(acc, penalty)
    found = {"xscore of all": scores, "models, best first": rank_models(scores)}
    for k, against in itertools.product(case.settings["sizes"], ("all", "complement")):
        records = subset_analysis(acc, [k], penalty, "max", against)
        name = against if against == "all" else "the complement"
        rhos = torch.tensor([record["rho"] for record in records], dtype=torch.float64)
        found[f"rho against {name}, size {k}"] = rhos
    subset, rho = best_subset(acc, 1, penalty)
    found["best subset of size 1"] = torch.tensor(subset)
    return found | {"its rho": torch.tensor([rho], dtype=torch.float64)}


RUNS = {"score": of_scores, "odd": of_odd, "corr": of_correlations, "subsets": of_subsets}


@pytest.mark.parametrize("case", list(load_reference("xscore")), ids=lambda case: case.name)
def test_against_the_reference(case, agree):
    agree(case, RUNS[case.settings["what"]](case))


# ---------------------------------------------------------------- bad input

OK = HAND.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xscore(torch.rand(3)), r"models by data sets, got torch.float32 of shape \(3,\)"),
        (lambda: xscore(torch.rand(2, 0)), r"models by data sets, got .* \(2, 0\)"),
        (lambda: xscore(torch.rand(2, 2) + 0j), "acc must be real numbers"),
        (lambda: xscore([[0.1, 0.2], [0.3]]), "acc must be a table of numbers"),
        (lambda: xscore([["good", "bad"]]), "acc must be a table of numbers"),
        (lambda: xscore([[90.0, 50], [60, 50]]), r"\[0, 1\], got 50 to 90; .* divide by 100"),
        (lambda: xscore([[0.5, -0.1]]), r"acc must lie in \[0, 1\], got -0.1 to 0.5$"),
        (lambda: xscore([[0.5, math.nan]]), r"acc must lie in \[0, 1\], got nan"),
        (lambda: xscore([[0.5, 0.0], [0.5, 0]]), "above 0 in each column, got none in 1"),
        (lambda: xscore(OK, -1), "penalty must be at least 0 and finite, got -1"),
        (lambda: xscore(OK, math.nan), "penalty must be at least 0"),
        (lambda: xscore(OK, math.inf), "penalty must be at least 0 and finite, got inf"),
        (lambda: xscore(OK, 1, "maxx"), "method must be one of .* did you mean 'max'"),
        (lambda: xscore(OK, 1, "chance"), "num_classes must be a whole number .* got None"),
        (lambda: xscore(OK, 1, "chance", 1), "num_classes must be a whole number from 2 on"),
        (lambda: xscore(OK, 1, "chance", [2, 3, 4]), r"and 2 data sets; got \[2, 3, 4\]"),
        (lambda: xscore(OK, 1, "chance", 2.5), "num_classes must be a whole number"),
        (lambda: rank_models(torch.tensor([1.0, math.nan])), "scores must be a vector of finite"),
        (lambda: rank_models(torch.rand(2, 2)), "scores must be a vector"),
        (lambda: rank_correlation([1.0], [2.0]), "the same two models or more, got 1, 1"),
        (lambda: rank_correlation([1.0, 2], [2.0, 3, 4]), "the same two models or more, got 2, 3"),
        (lambda: rank_correlation([1.0, 2], [1.0, math.inf]), "b must be a vector of finite"),
        (lambda: rank_correlation([1.0, 2], [1.0, 2], "pearson"), "method must be one of"),
        (lambda: pairwise_dataset_correlation([[0.1, 0.2]]), "two models or more .* got 1"),
        (lambda: subset_analysis(OK[:1]), "two models or more"),
        (lambda: subset_analysis(OK, [0]), r"k, the size of a subset, must be in 1\.\.2, got 0"),
        (lambda: subset_analysis(OK, [3]), r"must be in 1\.\.2, got 3"),
        (lambda: subset_analysis(OK, [2], against="complement"), r"in 1\.\.1, got 2"),
        (lambda: subset_analysis(OK, against="rest"), "against must be one of"),
        (lambda: subset_analysis(torch.rand(3, 30), [15]), "at most 1,000,000, got 155,117,520"),
        (lambda: best_subset(OK, 2.5), "must be a whole number"),
        (lambda: bootstrap_xscore(OK, 0), "n must be at least 1"),
        (lambda: run_benchmark({}, {"a": None}, [0]), "must hold at least one each"),
        (lambda: run_benchmark(micro_zoo(), {}, [0]), "must hold at least one each"),
        (lambda: public_suite([]), "sources must name one data set or more"),
        (lambda: public_suite(["cifr10"]), "did you mean 'cifar10'"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
