"""Claims: numbers against bounds, a table, a record for the runner, and an error if one fails."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from shuffle_nb.foundations.claims import (
    CLAIMS_MIME,
    Claim,
    ClaimNotMet,
    check_claims,
    claims_as_html,
    claims_as_text,
    readable,
)

OPERATORS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
}


def claim(ours=1.0, relation=">=", bound=0.5, **options) -> Claim:
    return Claim("it works", "0.9 on a large set", ours, relation, bound, **options)


@given(st.floats(-5, 5), st.sampled_from(sorted(OPERATORS)), st.floats(-5, 5))
def test_a_claim_holds_as_its_relation_says(ours, relation, bound):
    assert claim(ours, relation, bound).holds == OPERATORS[relation](ours, bound)


@pytest.mark.parametrize("relation", sorted(OPERATORS))
def test_nan_never_holds(relation):
    assert not claim(math.nan, relation).holds


def test_tensors_and_numpy_numbers_become_plain_ones():
    made = claim(torch.tensor(0.75), spread=np.float32(0.25), seeds=3)
    assert type(made.ours) is float and type(made.spread) is float and made.holds
    assert claim(np.int64(3), "==", 3).holds


def test_a_claim_over_seeds_is_on_their_mean():
    made = Claim.over_seeds("it works", "-", torch.tensor([1.0, 2.0, 6.0]), ">", 2.5, "m")
    assert (made.ours, made.seeds, made.unit) == (3.0, 3, "m") and made.holds
    assert made.spread == pytest.approx(np.std([1, 2, 6], ddof=1))
    assert Claim.over_seeds("it works", "-", [1.0], ">", 0).spread is None
    assert not Claim.over_seeds("it works", "-", [1.0, math.nan], ">", 0).holds


def test_a_failing_claim_raises_after_the_table_was_shown(capsys):
    claims = [claim(), claim(0.1, unit="nats", spread=0.02, seeds=3), claim(math.nan, "<")]
    with pytest.raises(ClaimNotMet, match=r"2 of 3 claims do not hold.*0.1 ± 0.02 nats.*nan"):
        check_claims(claims)
    printed = capsys.readouterr().out
    assert "it works" in printed and printed.count("NO") == 2 and "(3 seeds)" in printed


def test_all_holding_says_so_and_returns(capsys):
    check_claims([claim()])
    assert "yes" in capsys.readouterr().out


def test_in_a_notebook_the_output_carries_html_text_and_a_record():
    InteractiveShell.instance()
    try:
        with capture_output() as captured, pytest.raises(ClaimNotMet):
            check_claims([claim(), claim(math.inf, "<", 2.0)])
    finally:
        InteractiveShell.clear_instance()
    (output,) = captured.outputs
    assert "<table>" in output.data["text/html"] and "it works" in output.data["text/plain"]
    records = json.loads(json.dumps(output.data[CLAIMS_MIME], allow_nan=False))["claims"]
    assert [r["holds"] for r in records] == [True, False]
    assert records[0]["ours"] == 1.0 and records[1]["ours"] == "inf"
    assert set(records[0]) == {
        "text", "paper", "ours", "relation", "bound", "unit", "spread", "seeds", "holds",
    }  # fmt: skip


def test_html_is_escaped_and_text_aligned():
    odd = Claim("a < b & c", "<b>", 1, "==", 1)
    assert "a &lt; b &amp; c" in claims_as_html([odd]) and "<b>" not in claims_as_html([odd])
    lines = claims_as_text([odd, claim()]).splitlines()
    assert (
        len({line.index(word) for line, word in zip(lines, ("paper", "<b>", "0.9"), strict=True)})
        == 1
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(3950648, "3,950,648"), (0.28731, "0.287"), (12.0, "12"), (1234.5, "1,234"), (0, "0"),
     (-0.00001234, "-1.23e-05"), (math.nan, "nan"), (-math.inf, "-inf")],
)  # fmt: skip
def test_numbers_are_written_for_people(number, text):
    assert readable(number) == text


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: claim(relation="~"), "relation must be one of .*got '~'"),
        (lambda: claim(bound=math.nan), "bound must be a finite number"),
        (lambda: claim(seeds=0), "seeds must be at least 1"),
        (lambda: check_claims([]), "at least one claim"),
        (lambda: Claim.over_seeds("it works", "-", [], ">", 0), "one number a seed, got none"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
