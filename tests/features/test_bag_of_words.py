"""Bag of words: texts as sets of words, planted correlations, how words are arranged."""

import math
import unicodedata

import numpy as np
import pytest
import torch
from bags import as_sparse, random_bags, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.features import bag_of_words as module
from shuffle_nb.features.bag_of_words import (
    CATEGORIES,
    as_rows,
    bag_of_words,
    circular_bow,
    dense_parts,
    dense_rows,
    documentation,
    documentation_bag,
    draw_words,
    figure8_bow,
    gram_alignment,
    iid_bow,
    in_double,
    moments,
    nearest_columns,
    neighbour_order_score,
    picked_rows,
    prose,
    public_bag,
    same_topic_neighbours,
    shuffle_columns,
    sphere_bow,
    split_samples,
    word_correlations,
    word_topics,
    words_of,
)
from shuffle_nb.foundations import datasets, figures

OFF_DIAGONAL = ~torch.eye(12, dtype=torch.bool)


# ---------------------------------------------------------------- bag of words


def test_words_keep_case_and_small_numerals_and_lose_the_rest():
    text = "In 1999 the Cat_food saw 100 cats, 7 Cats & 101 dogs; naïve x2"
    found = words_of(text, {"the", "in"}, min_chars=0)
    assert found == {
        "In",
        "Cat",
        "food",
        "saw",
        "100",
        "cats",
        "7",
        "Cats",
        "dogs",
        "naïve",
        "x",
        "2",
    }
    assert "In" not in words_of(text, {"the", "in"}, min_chars=0, lowercase=True)
    assert words_of(text, min_chars=len(text) + 1) == set()
    assert words_of(text, min_chars=len(text)) != set()


@pytest.mark.parametrize("word", ["İstanbul", "Mu\u0308nchen", "e\u0301te\u0301", "i\u0307stanbul"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_a_word_with_accents_stays_whole(word, lowercase):
    found = words_of(f"{word} " * 8, min_chars=0, lowercase=lowercase)
    composed = unicodedata.normalize("NFC", word)
    assert found == {composed.lower() if lowercase else composed}


def test_two_spellings_of_an_accent_are_one_word():
    assert len(words_of("caf\u00e9 cafe\u0301", min_chars=0)) == 1
    assert words_of("x\u00b2 \u0301 7\u0301", min_chars=0) == {"7"}


def test_prose_loses_addresses_code_and_names():
    text = """Draw a plot, see https://en.wikipedia.org/wiki/Plot or www.x.org/a;
    use `nx` and ``plt``.
    The :func:`sum` of np.array, n_jobs and ValueError stay out. GPU stays.

    >>> import networkx as nx
    ... nx.draw()
    After it.
    References
    ----------
    Someone, somewhere.
    """
    kept = "Draw a plot see or use and The of and stay out GPU stays After it"
    assert words_of(prose(text), min_chars=0) == set(kept.split())
    assert prose("References to nodes are fine.") == "References to nodes are fine."


def test_the_worked_example_of_four_records():
    records = ["red apple", "green apple", "red rose", "blue sky"]
    x, vocab = bag_of_words(records, window=2, min_chars=0)
    assert vocab == ["apple", "red", "blue", "green", "rose", "sky"]
    assert x.tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1]]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=5), min_size=1, max_size=25),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 7),
)
def test_windows_are_unions_as_the_formula_says(records, window, stride, vocab_size):
    window = min(window, len(records))
    lines = [" ".join(record) for record in records]
    x, vocab = bag_of_words(lines, vocab_size, window, stride, min_chars=0)
    expected = []
    for start in range(0, len(records) - window + 1, stride):
        present = set().union(*records[start : start + window])
        expected.append([float(word in present) for word in vocab])
    expected = [row for row in expected if any(row)]
    assert x.tolist() == expected
    sparse, same = bag_of_words(lines, vocab_size, window, stride, min_chars=0, sparse=True)
    assert sparse.layout == torch.sparse_csr and same == vocab
    assert torch.equal(sparse.to_dense(), x)
    # The most frequent words, counted in records, ties in alphabetical order.
    counts = {word: sum(word in record for record in records) for word in "abcdef"}
    ranked = sorted((word for word in counts if counts[word]), key=lambda w: (-counts[w], w))
    assert vocab == ranked[:vocab_size]


@settings(deadline=None)
@given(st.permutations(["a b", "c", "d a", "e"]), st.integers(1, 3))
def test_order_and_repetition_inside_a_window_do_not_count(records, times):
    whole = bag_of_words(["a b", "c", "d a", "e"], window=4, min_chars=0)
    again = bag_of_words([" ".join([r] * times) for r in records], window=4, min_chars=0)
    assert torch.equal(whole[0], again[0]) and whole[1] == again[1]


def test_forced_words_come_first_even_if_rare_absent_or_stop_words():
    records = ["the cat", "cat dog", "dog cat"]
    options = dict(window=1, min_chars=0, stop_words={"the", "dog"})
    x, vocab = bag_of_words(records, forced=("zebra", "the"), **options)
    assert vocab == ["zebra", "the", "cat"]
    assert x.tolist() == [[0, 1, 1], [0, 0, 1], [0, 0, 1]]
    _, vocab = bag_of_words(records, 2, forced=("Zebra",), lowercase=True, **options)
    assert vocab == ["zebra", "cat"]


def test_english_stop_words_are_case_sensitive_and_empty_windows_are_dropped():
    records = ["the and of", "The graph", "12345"]
    x, vocab = bag_of_words(records, window=1, stop_words="english", min_chars=0)
    assert vocab == ["The", "graph"] and x.tolist() == [[1, 1]]
    x, vocab = bag_of_words(records, window=1, min_chars=1000)
    assert x.shape == (0, 0) and vocab == []


def test_documentation_is_read_once_and_comes_from_foundations():
    assert module.package_docstrings is datasets.package_docstrings
    documentation.cache_clear()
    texts = documentation(("torch.optim",))
    assert documentation(("torch.optim",)) is texts
    assert list(texts) == datasets.package_docstrings(["torch.optim"])
    x, vocab = bag_of_words([t for _, t in texts], 50, 1, stop_words="english", lowercase=True)
    assert x.shape[1] == 50 and "optimizer" in vocab and "the" not in vocab


# ---------------------------------------------------------------- synthetic sets


def test_check_values_of_the_circle():
    X = circular_bow(2000)
    assert X.mean().item() == pytest.approx(0.498, abs=5e-4)
    found = word_correlations(X)[0, :7].tolist()
    expected = [1, 0.674, 0.335, 0.003, -0.340, -0.663, -0.838]
    assert found == pytest.approx(expected, abs=6e-4)
    assert torch.equal(X, circular_bow(2000, seed=42))
    assert not torch.equal(X, circular_bow(2000, seed=43))


def test_population_values_of_the_circle():
    X = circular_bow(120_000)
    expected = torch.tensor([1, 0.662, 0.333, 0, -0.333, -0.662, -0.824])
    assert X.mean().item() == pytest.approx(0.5, abs=0.004)
    assert torch.allclose(word_correlations(X)[0, :7], expected, atol=0.012)


@pytest.mark.parametrize(
    ("draw", "curve"),
    [
        (circular_bow, lambda t: (math.cos(t), math.sin(t))),
        (figure8_bow, lambda t: (math.sin(t), math.sin(2 * t))),
    ],
)
def test_curves_are_the_formula_sample_by_sample(draw, curve):
    n, random = 7, np.random.RandomState(3)
    X = draw(50, n, sharpness=4.0, log_odds=-1.0, seed=3)
    for s in range(50):
        u = curve(2 * math.pi * (s % n) / n)
        for i in range(n):
            v = curve(2 * math.pi * i / n)
            logit = 4.0 * (v[0] * u[0] + v[1] * u[1]) - 1.0
            assert X[s, i] == (random.random_sample() < 1 / (1 + math.exp(-logit)))


def test_sphere_is_the_formula_sample_by_sample():
    n, random = 5, np.random.RandomState(3)
    X = sphere_bow(40, n, sharpness=6.0, log_odds=-0.5, seed=3)

    def point(longitude, colatitude):
        ring = math.sin(colatitude)
        places = math.cos(longitude) * ring, math.sin(longitude) * ring, math.cos(colatitude)
        return np.array(places)

    golden = math.pi * (1 + 5**0.5)
    words = [point(golden * (i + 0.5), math.acos(1 - 2 * (i + 0.5) / n)) for i in range(n)]
    for s in range(40):
        u = point(2 * math.pi * random.random_sample(), math.acos(2 * random.random_sample() - 1))
        for i in range(n):
            chance = 1 / (1 + math.exp(-(6.0 * words[i] @ u - 0.5)))
            assert X[s, i] == (random.random_sample() < chance)


def test_noise_moves_the_angles_after_the_uniform_draws():
    X, random = circular_bow(60, 7, sharpness=4.0, noise=0.5, seed=3), np.random.RandomState(3)
    draws, moved = random.random_sample((60, 7)), random.normal(0, 0.5, 60)
    for s in range(60):
        angle = 2 * math.pi * (s % 7) / 7 + moved[s]
        for i in range(7):
            logit = 4.0 * math.cos(angle - 2 * math.pi * i / 7)
            assert X[s, i] == (draws[s, i] < 1 / (1 + math.exp(-logit)))


@pytest.mark.parametrize("draw", [circular_bow, figure8_bow, sphere_bow])
def test_noise_changes_samples_and_extreme_sharpness_is_fine(draw):
    assert not torch.equal(draw(600), draw(600, noise=0.3))
    assert set(draw(50, 3, sharpness=1e6, noise=0.1).unique().tolist()) <= {0.0, 1.0}


def test_independent_words():
    X = iid_bow(50_000, p=0.3)
    assert X.shape == (50_000, 12)
    assert torch.allclose(X.mean(0), torch.tensor(0.3), atol=0.01)
    assert word_correlations(X)[OFF_DIAGONAL].abs().max() < 0.025
    assert not iid_bow(10, p=0.0).any() and iid_bow(10, p=1.0).all()


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 5))
def test_shuffled_columns_keep_their_values(samples, n, seed):
    X = torch.rand(samples, n, generator=seeded(seed))
    mixed = shuffle_columns(X, seeded(seed))
    assert torch.equal(mixed.sort(0).values, X.sort(0).values)
    bags = (X < 0.4).float()
    assert torch.equal(shuffle_columns(bags, seeded(seed)).sum(0), bags.sum(0))
    sparse = shuffle_columns(as_sparse(bags), seeded(seed))
    assert sparse.layout == torch.sparse_csr
    assert torch.equal(sparse.to_dense().sum(0), bags.sum(0))
    assert set(sparse.to_dense().unique().tolist()) <= {0.0, 1.0}


def test_sparse_shuffling_keeps_the_values_of_each_column():
    X = random_bags(dtype=torch.float32) * torch.arange(1, 10)  # word i has the value i + 1
    mixed = shuffle_columns(as_sparse(X), seeded()).to_dense()
    assert torch.equal(mixed.sort(0).values, X.sort(0).values)


@pytest.mark.parametrize("make", [torch.clone, as_sparse])
def test_shuffling_drives_correlations_down_as_one_over_root_n(make):
    for samples in (500, 2000, 8000):
        mixed = shuffle_columns(make(circular_bow(samples)), seeded())
        mean = word_correlations(mixed)[OFF_DIAGONAL].abs().mean().item()
        assert mean == pytest.approx(math.sqrt(2 / (math.pi * samples)), rel=0.35)


# ---------------------------------------------------------------- rows of many samples


@pytest.mark.parametrize("make", [torch.clone, as_sparse])
def test_rows_and_parts_are_those_of_the_dense_matrix(make):
    X = random_bags()
    X[3] = 0  # an empty row
    index = torch.tensor([5, 3, 5, 0])
    assert torch.equal(dense_rows(make(X), index), X[index])
    parts = list(dense_parts(make(X), 25))
    assert [len(part) for part in parts] == [25, 25, 10]
    assert torch.equal(torch.cat(parts), X)
    mean, covariance = moments(make(X.float()))
    assert mean.dtype == covariance.dtype == torch.float64
    assert torch.allclose(mean, X.mean(0))
    assert torch.allclose(covariance, torch.cov(X.T, correction=0))


def test_picked_rows_say_where_each_begins():
    X = random_bags()
    X[3] = 0
    rows, columns, values, offsets = picked_rows(as_sparse(X), torch.tensor([5, 3, 0]))
    counts = X[[5, 3, 0]].sum(1).int().tolist()
    assert rows.tolist() == [0] * counts[0] + [2] * counts[2]
    assert offsets.tolist() == [0, counts[0], counts[0]] and (values == 1).all()
    assert columns[: counts[0]].tolist() == X[5].nonzero().flatten().tolist()


@pytest.mark.parametrize("sparse", [True, False])
def test_pairs_become_rows_and_empty_rows_are_dropped(sparse):
    made = as_rows(np.array([0, 0, 2, 5]), np.array([1, 3, 0, 2]), 4, sparse)
    made = made.to_dense()
    assert made.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]


def test_in_double_keeps_the_values():
    assert in_double(torch.tensor([0.5])).dtype == torch.float64


# ---------------------------------------------------------------- how words are arranged


def test_nearest_columns_ignore_lengths_and_the_column_itself():
    W = torch.tensor([[1.0, 9.0, 0.0, -1.0], [0.0, 1.0, 2.0, 0.1]])
    assert nearest_columns(W, 1).flatten().tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("make", [torch.clone, as_sparse])
def test_correlations_are_those_of_numpy(make):
    X = random_bags(5000)
    X[:, 3] = 0
    found = word_correlations(make(X))
    assert found[3].isnan().all() and found[:, 3].isnan().all()
    varying = torch.arange(9) != 3
    expected = torch.from_numpy(np.corrcoef(X[:, varying].T))
    assert torch.allclose(found[varying][:, varying], expected)


def test_alignment_is_the_correlation_of_the_off_diagonal_entries():
    C = word_correlations(circular_bow(500))
    assert gram_alignment(3 * C + 0.2, C) == pytest.approx(1)
    assert gram_alignment(-C, C) == pytest.approx(-1)
    assert gram_alignment(C + 100 * torch.eye(12), C) == pytest.approx(1)  # the diagonal is out
    G = torch.randn(12, 12, generator=seeded())
    expected = np.corrcoef(G[OFF_DIAGONAL], C[OFF_DIAGONAL])[0, 1]
    assert gram_alignment(G, C) == pytest.approx(expected, abs=1e-6)
    C[5], C[:, 5] = torch.nan, torch.nan  # a constant word is ignored
    kept = OFF_DIAGONAL & ~C.isnan()
    assert gram_alignment(G, C) == pytest.approx(np.corrcoef(G[kept], C[kept])[0, 1], abs=1e-6)


def test_order_score_of_circles_and_of_chance():
    angles = 2 * math.pi * torch.arange(12) / 12
    circle = torch.stack([angles.cos(), angles.sin()])
    assert neighbour_order_score(circle) == 1
    assert neighbour_order_score(circle * torch.rand(12) + 0) == 1  # lengths do not matter
    assert neighbour_order_score(circle[:, (5 * torch.arange(12)) % 12]) == 0
    chance = [neighbour_order_score(torch.randn(6, 12, generator=seeded(i))) for i in range(300)]
    assert np.mean(chance) == pytest.approx(2 / 11, abs=0.02)


def test_topics_by_lift():
    X = torch.tensor([[1, 0, 1, 0.0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert word_topics(X, labels, min_lift=2.0).tolist() == [-1, 1, 0, -1]
    assert word_topics(X, labels, min_lift=2.5).tolist() == [-1, -1, -1, -1]  # lift is 5 / 2


def test_same_topic_neighbours_of_islands_and_of_chance():
    topics = torch.arange(60) % 4
    islands = torch.eye(4)[topics].T + 0.05 * torch.randn(4, 60, generator=seeded())
    assert same_topic_neighbours(islands, topics) == 1
    topics[::3] = -1  # words without a topic are no neighbours
    assert same_topic_neighbours(islands, topics) == 1
    cloud = torch.randn(30, 600, generator=seeded())
    assert same_topic_neighbours(cloud, torch.arange(600) % 4) == pytest.approx(0.25, abs=0.03)


def test_words_are_drawn_as_a_cycle_at_their_own_distances():
    angles = 2 * math.pi * torch.arange(12) / 12
    plane = torch.linalg.qr(torch.randn(6, 2, generator=seeded())).Q  # a plane in six dimensions
    _, axis = figures.subplots()
    draw_words(axis, plane @ torch.stack([angles.cos(), 2 * angles.sin()]), list("JFMAMJJASOND"))
    places = torch.from_numpy(np.asarray(axis.collections[0].get_offsets()))
    expected = torch.stack([angles.cos(), 2 * angles.sin()], 1).double()
    assert torch.allclose(torch.cdist(places, places), torch.cdist(expected, expected), atol=1e-5)
    assert [text.get_text() for text in axis.texts] == list("JFMAMJJASOND")
    assert np.allclose(axis.patches[0].get_xy()[:12], places)
    assert not figures.dropped_points(axis.figure)
    with pytest.raises(ValueError, match=r"W must be \(m, 3\), got shape \(2, 4\)"):
        draw_words(axis, torch.zeros(2, 4), list("abc"))


# ---------------------------------------------------------------- texts ready to use


def test_documentation_becomes_samples_with_a_package_as_topic():
    packages = ["torch.optim", "torch.nn", "torch.distributions"]
    samples, vocab, topics = documentation_bag(packages, 100, min_words=3)
    assert samples.shape[1] == len(vocab) == len(topics) == 100
    assert samples.sum(1).min() >= 3 and set(samples.unique().tolist()) == {0, 1}
    assert topics[vocab.index("optimizer")] == 0 and topics[vocab.index("distribution")] == 2
    assert not {"the", "x", "self", "7"} & set(vocab)
    assert len(documentation_bag(packages, 100, min_words=9)[0]) < len(samples)


def test_a_public_text_is_cut_before_its_windows_are(monkeypatch):
    records = [f"May and Mars number {'abcdefghij'[i % 10] * 3}" for i in range(40)]
    records += ["quite other records"] * 4  # the last tenth has words of its own
    monkeypatch.setattr(module, "load_text", lambda source, max_documents: records)
    monkeypatch.setattr(module, "bag_of_words", lambda *a, **o: bag_of_words(*a, **o, min_chars=0))
    train, test, vocab, topics = public_bag("here", 60, window=2, max_records=44)
    assert train.layout == test.layout == torch.sparse_csr
    assert (len(train), len(test)) == (38, 1)  # empty windows are dropped
    assert test.shape[1] == len(vocab)
    assert topics[vocab.index("May")] == list(CATEGORIES).index("months")
    assert topics[vocab.index("Mars")] == list(CATEGORIES).index("planets")
    assert topics[vocab.index("number")] == -1 and "records" not in vocab


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_split_deals_out_every_sample_once(share):
    X = torch.arange(10.0).unsqueeze(1)
    train, test = split_samples(X, 3, share)
    assert len(test) == int(10 * share)
    assert sorted(torch.cat([train, test]).flatten().tolist()) == list(range(10))
    assert torch.equal(split_samples(X, 3, share)[0], train)


# ---------------------------------------------------------------- bad input

TWO = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]])


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: bag_of_words(["a"], window=0), "window must be at least 1, got 0"),
            (lambda: bag_of_words(["a"], stride=0), "stride must be at least 1, got 0"),
            (lambda: bag_of_words(["a"], vocab_size=0), "vocab_size must be at least 1"),
            (lambda: bag_of_words(["a"] * 19), "window of 20, got 19"),
            (lambda: bag_of_words([]), "got 0"),
            (lambda: bag_of_words(["a"], 1, 1, forced=("b", "c")), "at most 1 words, got 2"),
            (lambda: bag_of_words(["a"], window=1, stop_words="french"), "'english'.*'french'"),
            (lambda: documentation(("no_such_package",)), "no_such_package"),
            (lambda: circular_bow(0), "num_samples must be at least 1"),
            (lambda: figure8_bow(5, 0), "n must be at least 1"),
            (lambda: sphere_bow(5, noise=-1.0), "noise must not be negative"),
            (lambda: iid_bow(5, p=1.5), r"p must be in \[0, 1\], got 1.5"),
            (lambda: shuffle_columns(TWO[0]), r"shape \(4,\)"),
            (lambda: gram_alignment(torch.eye(3), torch.eye(4)), r"\(3, 3\) and \(4, 4\)"),
            (lambda: gram_alignment(torch.eye(2), torch.eye(2)), "at least three words"),
            (lambda: word_topics(TWO, torch.zeros(3, dtype=torch.long)), r"labels must be \(2\)"),
            (lambda: split_samples(TWO, 0, 1.5), r"test_share must be in \[0, 1\], got 1.5"),
            (lambda: word_correlations(TWO.long()), "floats, got torch.int64"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
