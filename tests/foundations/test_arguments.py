"""Arguments: one clear sentence for each bad one, and values that are read only where free."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shuffle_nb.foundations.arguments import (
    drawing_device,
    may_look,
    nearest,
    require_at_least_one,
    require_between,
    require_divisible,
    require_finite,
    require_ids,
    require_one_of,
    require_permutation,
    require_positive,
    require_probability,
    require_shape,
)


def accepts(check, *positional, **named) -> bool:
    try:
        check(*positional, **named)
    except ValueError:
        return False
    return True


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1) | st.none()))
def test_good_counts_pass(values):
    require_at_least_one(**values)


@pytest.mark.parametrize("value", [0, -3])
def test_the_first_bad_count_is_named(value):
    with pytest.raises(ValueError, match=f"^heads must be at least 1, got {value}$"):
        require_at_least_one(dim=8, heads=value, groups=0)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("value", [2.0, 2.5, "3", True, math.nan, torch.ones(2), np.float64(2)])
def test_what_is_no_whole_number_is_no_count(value):
    for check in (require_at_least_one, lambda **named: require_between(1, 9, **named)):
        with pytest.raises(ValueError, match=r"^heads must be a whole number, got "):
            check(heads=value)


@pytest.mark.usefixtures("plain_python")
def test_whole_numbers_of_numpy_are_counts():
    require_at_least_one(heads=np.int64(3))


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(-7, 7))
def test_between(low, high, value):
    assert accepts(require_between, low, high, k=value) == (low <= value <= high)


@given(st.integers(-2, 12), st.integers(-2, 5))
def test_divisible(value, divisor):
    fine = value >= 1 and divisor >= 1 and value % divisor == 0
    assert accepts(require_divisible, "heads", divisor, dim=value) == fine


@given(st.floats() | st.lists(st.floats(width=32), max_size=4).map(torch.tensor))
def test_checks_of_values_equal_looking_at_each(value):
    each = value.tolist() if isinstance(value, torch.Tensor) else [value]
    assert accepts(require_probability, p=value) == all(0 <= v <= 1 for v in each)
    assert accepts(require_positive, p=value) == all(0 < v < math.inf for v in each)
    assert accepts(require_finite, p=value) == all(math.isfinite(v) for v in each)


@given(
    st.lists(st.integers(-1, 4), max_size=5).map(lambda ids: torch.tensor(ids, dtype=torch.long))
)
def test_ids_and_permutations_equal_looking_at_each(ids):
    assert accepts(require_ids, 4, ids=ids) == all(0 <= i < 4 for i in ids.tolist())
    is_permutation = sorted(ids.tolist()) == list(range(len(ids)))
    assert accepts(require_permutation, len(ids), perm=ids) == is_permutation
    rows = torch.stack([torch.arange(len(ids)), ids])
    assert accepts(require_permutation, len(ids), perm=rows) == is_permutation


@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.integers(0, 3) | st.just("any"), max_size=4),
    st.booleans(),
)
def test_shapes(found, axes, open_front):
    tail = found[len(found) - len(axes) :] if open_front and len(found) >= len(axes) else found
    fits = len(tail) == len(axes) and all(a in ("any", n) for a, n in zip(axes, tail, strict=True))
    shape = (..., *axes) if open_front else axes
    assert accepts(require_shape, *shape, x=torch.zeros(found)) == fits


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: require_between(1, 10, k=11), "k must be in 1..10, got 11"),
        (lambda: require_divisible("heads", 4, dim=30), "dim must be divisible by heads 4, got 30"),
        (lambda: require_divisible("heads", 0, dim=30), "heads must be at least 1, got 0"),
        (
            lambda: require_one_of(["mean", "sum"], kind="avg"),
            "kind must be one of ['mean', 'sum'], got 'avg'",
        ),
        (
            lambda: require_one_of(("mean", "sum"), kind="Mean"),
            "kind must be one of ['mean', 'sum'], got 'Mean'; did you mean 'mean'?",
        ),
        (
            lambda: require_shape("batch", 3, y=None, x=torch.ones(2)),
            "x must be (batch, 3), got shape (2,)",
        ),
        (lambda: require_shape(..., 3, x=torch.ones(())), "x must be (..., 3), got shape ()"),
        (lambda: require_probability(p=None, q=1.5), "q must be in [0, 1], got 1.5"),
        (lambda: require_probability(p=math.nan), "p must be in [0, 1], got nan"),
        (
            lambda: require_probability(p=torch.tensor([0, torch.nan])),
            "p must be in [0, 1], got nan",
        ),
        (lambda: require_positive(p=math.nan), "p must be positive and finite, got nan"),
        (
            lambda: require_probability(p=torch.tensor([0.5, -1])),
            "p must be in [0, 1], got -1 to 0.5",
        ),
        (lambda: require_positive(sigma=math.inf), "sigma must be positive and finite, got inf"),
        (lambda: require_finite(x=torch.tensor([1, torch.nan])), "x must be finite, got nan"),
        (
            lambda: require_ids(3, ids=torch.tensor([1_234_567])),
            "ids must be in 0..2, got 1234567 to 1234567",
        ),
        (lambda: require_ids(3, ids=torch.ones(2)), "ids must be whole numbers, got torch.float32"),
        (
            lambda: require_ids(3, ids=torch.ones(2) > 0),
            "ids must be whole numbers, got torch.bool",
        ),
        (
            lambda: require_permutation(3, perm=torch.tensor([0, 2, 2])),
            "perm must be a permutation of range(3), but 1 is missing",
        ),
        (
            lambda: require_permutation(3, perm=torch.tensor([0, 1])),
            "perm must be (..., 3), got shape (2,)",
        ),
    ],
)
def test_the_sentences(call, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call()


def test_the_nearest_name():
    assert nearest("CIFAR10", ["cifar100", "cifar10"]) == "cifar10"
    assert nearest("wave", ["cifar10"]) is None


def test_values_are_read_on_a_cpu_and_nowhere_else():
    assert may_look(torch.ones(3)) and may_look(torch.tensor(True))
    assert not may_look(torch.ones(3, device="meta"))
    assert not may_look(torch.ones(0))
    elsewhere = torch.full((3,), 7, device="meta")
    require_probability(p=elsewhere)
    require_permutation(3, perm=elsewhere)


def test_a_compiled_graph_is_not_broken(plain_python):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def checked_double(x, perm):
        require_at_least_one(size=x.shape[0])
        require_divisible("three", 3, size=x.shape[0])
        require_shape("size", x=x)
        require_shape(..., 3, perm=perm)
        require_one_of(["a", "b"], kind="a")
        require_probability(x=x, p=0.5)
        require_positive(x=x)
        require_finite(x=x)
        require_permutation(3, perm=perm)
        if may_look(x) and not (x > 0).all():
            raise ValueError("x must be positive")
        return 2 * x

    x = -torch.ones(3)
    assert torch.equal(checked_double(x, torch.zeros(3, dtype=torch.long)), 2 * x)


def test_numbers_are_drawn_where_the_generator_lives():
    assert drawing_device(None, "meta") == torch.device("meta")
    assert drawing_device(torch.Generator("cpu"), "meta") == torch.device("cpu")


def test_a_permutation_is_checked_where_it_lies():
    perm = torch.tensor([1, 0, 2])
    with torch.device("meta"):
        require_permutation(3, perm=perm)
