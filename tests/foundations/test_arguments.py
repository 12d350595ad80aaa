"""Arguments: one clear sentence for a bad count, and values that are read only where it is free."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shuffle_nb.foundations.arguments import may_look, require_at_least_one


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1) | st.none()))
def test_good_counts_pass(values):
    require_at_least_one(**values)


@pytest.mark.parametrize("value", [0, -3])
def test_the_first_bad_count_is_named(value):
    with pytest.raises(ValueError, match=f"^heads must be at least 1, got {value}$"):
        require_at_least_one(dim=8, heads=value, groups=0)


def test_values_are_read_on_a_cpu_and_nowhere_else():
    assert may_look(torch.ones(3)) and may_look(torch.tensor(True))
    assert not may_look(torch.ones(3, device="meta"))
    assert not may_look(torch.ones(0))


def test_a_compiled_graph_is_not_broken(plain_python):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def checked_double(x):
        if may_look(x) and not (x > 0).all():
            raise ValueError("x must be positive")
        return 2 * x

    x = -torch.ones(3)
    assert torch.equal(checked_double(x), 2 * x)
