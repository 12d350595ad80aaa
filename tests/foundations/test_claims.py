"""Claims: every seed against the bound, a control that must break it, a table, a record."""

import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from shuffle_nb.foundations import claims
from shuffle_nb.foundations.claims import (
    CLAIMS_MIME,
    Claim,
    ClaimNotMet,
    Control,
    Table,
    check_claims,
    claim_record,
    claims_table,
    plain_text,
    readable,
)
from shuffle_nb.runner.catalogue import claim_of, stored_claims

OPERATORS = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
}
values = st.lists(st.floats(-5, 5) | st.just(1.0), min_size=3, max_size=6)


def effect(ours=(1.0, 1.1, 1.2), relation=">=", bound=0.5, control=(0.1, 0.2, 0.3), **options):
    control = Control("mechanism off", control) if control is not None else None
    options = {"id": "it-works", "text": "it works", "kind": "effect"} | options
    return Claim(ours=ours, relation=relation, bound=bound, control=control, **options)


def count(ours=12, bound=12, **options):
    options = {"paper": "12", "id": "as-counted"} | options
    return Claim(text="parameters", kind="count", ours=ours, relation="==", bound=bound, **options)


def cost(ours=(2.0, 2.1, 2.2), **options):
    return Claim("faster", "it is faster", "cost", ours, ">", 1.5, **options)


# Verdicts


@given(values, st.sampled_from(sorted(OPERATORS)), st.floats(-5, 5), values, st.booleans())
def test_every_seed_meets_the_bound_and_no_value_of_the_control(
    ours, relation, bound, control, expected
):
    control = (control * 2)[: max(len(control), len(ours))]
    made = effect(ours, relation, bound, control, expected=expected)
    meets = [OPERATORS[relation](value, bound) for value in ours]
    broken = not any(OPERATORS[relation](value, bound) for value in control)
    assert made.holds == (all(meets) and broken)
    if made.holds:
        assert made.verdict == ("holds" if expected else "shown after all")
    elif not expected:
        assert made.verdict == "not shown here"
    else:
        assert made.verdict == ("too weak" if all(meets) else "fails")


@pytest.mark.parametrize("relation", sorted(OPERATORS))
@pytest.mark.parametrize("expected", [True, False])
def test_nan_never_holds_and_is_no_finding_either(relation, expected):
    made = effect([1.0, math.nan, 1.0], relation, 1.0, expected=expected)
    assert not made.holds and made.verdict == "fails"


def test_one_value_of_the_control_is_enough_to_make_a_claim_too_weak():
    assert effect(control=[0.1, 0.5, 0.2]).verdict == "too weak"
    assert effect(control=0.5).verdict == "too weak"
    assert cost(control=Control("nothing left out", [1.0, 1.0, 1.6])).verdict == "too weak"


def test_infinity_is_a_number():
    assert effect([math.inf] * 3).holds
    assert effect(control=[math.inf] * 3).verdict == "too weak"


# What is taken for a number


@pytest.mark.parametrize(
    "ours",
    [
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        np.array([1, 2, 3], dtype=np.float32),
        [torch.tensor(1.0), np.float16(2), 3],
        (Fraction(1), np.int64(2), 3.0),
        iter([1, 2, 3]),
        {"a": 1, "b": 2, "c": 3}.values(),
    ],
    ids=lambda ours: type(ours).__name__,
)
def test_tensors_arrays_and_their_numbers_become_plain_ones(ours, plain_python):
    made = effect(ours)
    assert made.ours == (1.0, 2.0, 3.0) and all(type(value) is float for value in made.ours)


def test_a_single_number_may_be_a_tensor_too():
    made = count(torch.tensor(12), bound=np.int64(12))
    assert made.ours == (12.0,) and type(made.bound) is float and made.holds
    assert effect(bound=torch.tensor([0.5])).bound == 0.5


def test_texts_lose_what_a_terminal_would_act_on():
    made = effect(
        text="\x1b[31mall\x1b[0m\n well\x07\x9b2J \x1b]0;title\x07", paper="9\t0", unit="\x08s",
        source="Table\r\n2",
    )  # fmt: skip
    assert (made.text, made.paper, made.source, made.unit) == ("all well", "9 0", "Table 2", "s")
    assert Control("\x1b[2Jchance", 0.1).name == "chance"


@given(st.text())
def test_plain_text_is_one_printable_line(text):
    plain = plain_text(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", plain) and plain == plain.strip()
    assert plain_text(plain) == plain
    plain.encode()


# Tables


def test_the_table_shows_seeds_control_and_verdict():
    claims = [
        effect(unit="nats", paper="0.9", source="Table 2"),
        cost([2.0, 2.1, 2.6]),
        count(),
        effect([1, 1, 0.4], id="sometimes", expected=False),
    ]
    text, html = str(claims_table(claims)), claims_table(claims)._repr_html_()
    cells = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert cells[0] == ["claim", "paper", "ours", "bound", "control", "verdict"]
    for shown in (
        "0.9 (Table 2)", "1.1 ± 0.1 nats (1, 1.1, 1.2 nats)", ">= 0.5 nats",
        "mechanism off: 0.1, 0.2, 0.3", "2.1 (2 to 2.6, 3 pairs)", "holds", "not shown here",
    ):  # fmt: skip
        assert shown in text or shown.replace(">", "&gt;") in html, shown
    assert html.count("not shown here</span>") == 1 and html.count("holds</span>") == 3
    assert html.startswith('<div style="overflow-x:auto"><table>')


def test_the_mean_and_the_spread_are_those_of_the_seeds():
    ours = [0.123, 0.456, 0.789]
    mean, spread = statistics.mean(ours), statistics.stdev(ours)
    assert f"{mean:.3g} ± {spread:.3g} (" in str(claims_table([effect(ours, ">", 0)]))


@pytest.mark.parametrize(("value", "bound"), [(0.94996, 0.95), (999_999_999, 1_000_000_000)])
def test_a_number_that_misses_the_bound_does_not_read_like_the_bound(value, bound):
    for unit in ("", "B"):
        with pytest.raises(ClaimNotMet) as caught:
            check_claims([effect([value] * 3, ">=", bound, 0.0, unit=unit)])
        measured, needed = re.search(
            r"measured (.*), needed >= (.*) \(", str(caught.value)
        ).groups()
        assert measured != needed


def test_html_is_escaped_and_headings_are_too():
    odd = effect(text="a < b & c", paper="<b>")
    html = claims_table([odd])._repr_html_()
    assert "a &lt; b &amp; c" in html and "<b>" not in html
    assert "<i>" not in Table(["<i>"], [["<i>", 1]])._repr_html_()


def test_a_table_is_aligned_and_shows_itself():
    table = Table(["a", "b"], [["long text", 1], ["x", "1.50"]])
    lines = str(table).splitlines()
    assert lines[0].index("b") == lines[2].index("1") == lines[3].index("1.50")
    assert repr(table) == str(table) and "<td" in table._repr_html_()
    assert max(map(len, str(Table(["a"], [["word " * 30]])).splitlines())) <= 34
    assert str(Table(["a"], [])).split() == ["a", "---"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(3950648, "3,950,648"), (0.28731, "0.287"), (12.0, "12"), (1234.5, "1,234"), (0, "0"),
     (-0.00001234, "-1.23e-05"), (math.nan, "nan"), (-math.inf, "-inf"), (999.7, "1,000"),
     (1e20, "1e+20")],
)  # fmt: skip
def test_numbers_are_written_for_people(number, text):
    assert readable(number) == text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(0.5, "nats", "0.5 nats"), (16384, "tokens", "16,384 tokens"), (12_345_678, "B", "12.3 MB"),
     (999_999, "FLOPs", "1 MFLOPs"), (999, "FLOP", "999 FLOP"), (0.00042, "s", "420 µs"),
     (90, "s", "90 s"), (0, "s", "0 s"), (0, "B", "0 B"), (math.inf, "B", "inf B"),
     (math.nan, "s", "nan s"), (-2500, "Hz", "-2.5 kHz"), (3e15, "FLOP/s", "3,000 TFLOP/s"),
     (2e-12, "s", "0.002 ns")],
)  # fmt: skip
def test_large_numbers_of_bytes_and_operations_take_a_prefix(number, unit, text):
    assert readable(number, unit) == text


@given(st.floats(1e-9, 1e14), st.sampled_from(["", "B", "FLOP", "s", "nats"]))
def test_what_is_written_is_within_half_a_percent(number, unit):
    text, _, written = readable(number, unit).partition(" ")
    scale = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "m": 1e-3, "µ": 1e-6, "n": 1e-9}
    prefix = scale.get(written.removesuffix(unit), 1) if unit in ("B", "FLOP", "s") else 1
    assert float(text.replace(",", "")) * prefix == pytest.approx(number, rel=5.1e-3)


# All claims of a notebook


def emitted(claims):
    """What check_claims hands to a notebook."""
    InteractiveShell.instance()
    try:
        with capture_output() as captured, contextlib.suppress(ClaimNotMet):
            check_claims(claims)
    finally:
        InteractiveShell.clear_instance()
    (output,) = captured.outputs
    assert captured.stdout == captured.stderr == ""
    return output.data


def test_in_a_notebook_the_output_carries_html_text_and_a_record():
    weak = effect([1, 1, math.inf], id="weak", control=[0.6, 0.1, math.inf], unit="s")
    data = emitted([count(source="Table 1"), weak])
    assert "<table>" in data["text/html"] and "it works" in data["text/plain"]
    bundle = json.loads(json.dumps(data[CLAIMS_MIME], allow_nan=False))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", bundle["date"])
    assert bundle["claims"] == [
        {
            "id": "as-counted", "text": "parameters", "kind": "count", "paper": "12",
            "source": "Table 1", "ours": [12.0], "relation": "==", "bound": 12.0, "unit": "",
            "control": None, "verdict": "holds", "holds": True, "expected": True,
        },
        {
            "id": "weak", "text": "it works", "kind": "effect", "paper": "-", "source": "",
            "ours": [1.0, 1.0, "inf"], "relation": ">=", "bound": 0.5, "unit": "s",
            "control": {"name": "mechanism off", "values": [0.6, 0.1, "inf"]},
            "verdict": "too weak", "holds": False, "expected": True,
        },
    ]  # fmt: skip


def test_what_is_stored_is_read_back_by_the_runner():
    claims = [count(), effect([1, 1, math.nan]), effect(id="other", expected=False)]
    data = json.loads(json.dumps(emitted(claims)))
    stored = stored_claims([{"outputs": [{"data": data}]}])
    date = {"date": data[CLAIMS_MIME]["date"]}
    assert stored == [claim_record(claim) | date for claim in claims]
    assert [claim_of(record).verdict for record in stored] == ["holds", "fails", "shown after all"]


@pytest.mark.parametrize("ours", [4.0, "nan", None])
def test_what_was_stored_before_claims_had_kinds_is_read_too(ours):
    old = {
        "text": "it is fast", "paper": "-", "ours": ours, "relation": ">", "bound": 2.0,
        "unit": "x", "spread": None, "seeds": 1, "holds": True,
    }  # fmt: skip
    (claim,) = stored_claims([{"outputs": [{"data": {CLAIMS_MIME: {"claims": [old]}}}]}])
    assert set(claim) == {*claim_record(count()), "date"}
    assert (claim["id"], claim["kind"], claim["control"], claim["date"]) == ("", "", None, "")
    assert claim["ours"] == [4.0 if ours == 4.0 else "nan"]
    verdict = (True, "holds") if ours == 4.0 else (False, "fails")
    assert (claim["holds"], claim["verdict"]) == verdict
    assert "it is fast" in str(claims_table([claim_of(claim)]))


def test_all_met_says_so_and_returns(capsys):
    check_claims(iter([effect(), cost(), count(), effect([0, 0, 0], id="no", expected=False)]))
    assert capsys.readouterr().out.count("holds") == 3


WEAK = (
    '1 of 2 claims not met: "it works" (it-works) is too weak: its control, mechanism off, '
    "meets >= 0.5 nats as well (0.6 nats)"
)
UNEVEN = (
    '1 of 2 claims not met: "it works" (it-works) fails: seed 2 of 3 measured 0.4 nats, '
    "needed >= 0.5 nats (mechanism off: 0.1, 0.2, 0.3 nats)"
)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (effect(control=[0.1, 0.6, 0.2], unit="nats"), WEAK),
        (effect([1, 0.4, 0.3], unit="nats"), UNEVEN),
        (
            effect(expected=False),
            '1 of 2 claims not met: "it works" (it-works) is shown after all: '
            "1.1 ± 0.1 (1, 1.1, 1.2) meets >= 0.5, so drop expected=False",
        ),
        (
            cost([2, 1, 2]),
            '1 of 2 claims not met: "it is faster" (faster) fails: pair 2 of 3 measured 1, '
            "needed > 1.5",
        ),
        (
            count(13, id="miscounted"),
            '1 of 2 claims not met: "parameters" (miscounted) fails: measured 13, needed == 12',
        ),
        (
            effect([1, 1, math.nan], expected=False),
            '1 of 2 claims not met: "it works" (it-works) fails: seed 3 of 3 measured nan, '
            "needed >= 0.5 (mechanism off: 0.1, 0.2, 0.3)",
        ),
    ],
    ids=["too weak", "one seed below", "shown after all", "pair", "count", "nan"],
)
def test_what_is_not_met_raises_one_clear_sentence_after_the_table(claim, message, capsys):
    with pytest.raises(ClaimNotMet) as caught:
        check_claims([count(), claim])
    assert str(caught.value) == message
    assert claim.verdict in capsys.readouterr().out


def test_every_claim_that_is_not_met_is_named(capsys):
    with pytest.raises(ClaimNotMet, match=r"2 of 2 claims not met: .*it-works.*; .*miscounted"):
        check_claims([effect([0, 0, 0]), count(1, id="miscounted")])


def test_effects_and_costs_are_written_in_one_line():
    control = Control("mechanism off", 0.2)
    full = Claim("it-works", "it works", "effect", [2, 3, 4], ">=", 1, control=control, unit="bits")
    short = claims.effect("it-works", "it works", [2, 3, 4], ">=", 1, *("mechanism off", 0.2))
    assert replace(short, unit="bits") == full
    pairs = torch.tensor([1, 9, 2, 3, 0, 4, 5, 6, 5.0])
    assert claims.cost("fast", "fast", pairs, ">", 1, expected=False).ours == (2, 3, 5)
    with pytest.raises(ValueError, match="pairs must be a multiple of three numbers, got 4"):
        claims.medians_of_three([1, 2, 3, 4])


OURS = "ours must be a number or a flat sequence of them, got"


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: effect(relation="~"),
            "relation must be one of ['<', '<=', '>', '>=', '=='], got '~'",
        ),
        (
            lambda: effect(kind="fact"),
            "kind must be one of ['effect', 'cost', 'count'], got 'fact'",
        ),
        (lambda: effect(bound=math.nan), "bound must be one finite number, got (nan,)"),
        (lambda: effect(bound=math.inf), "bound must be one finite number, got (inf,)"),
        (lambda: effect(bound=[1, 2]), "bound must be one finite number, got (1.0, 2.0)"),
        (lambda: effect(bound=True), OURS.replace("ours", "bound") + " True"),
        (lambda: effect([True] * 3), f"{OURS} True"),
        (lambda: effect(torch.ones(3) > 0), f"{OURS} True"),
        (lambda: effect("0.5"), f"{OURS} '0.5'"),
        (lambda: effect([1, 2j, 3]), f"{OURS} 2j"),
        (lambda: effect(torch.ones(2, 1)), f"{OURS} [1.0]"),
        (lambda: effect({"a": 1}), f"{OURS} {{'a': 1}}"),
        (lambda: effect([]), "ours must hold at least one number, got none"),
        (
            lambda: effect([1, 2]),
            "ours must hold three values or more for kind 'effect', one a seed, got 2",
        ),
        (
            lambda: cost(2.0),
            "ours must hold three values or more for kind 'cost', one a pair, got 1",
        ),
        (
            lambda: effect(control=None),
            "control must say what breaks the effect 'it-works', got None",
        ),
        (
            lambda: effect(control=[0.1, 0.2]),
            "control must hold one known number or one a seed (3), got 2",
        ),
        (
            lambda: effect(control=[0.1, math.nan, 0.2]),
            "control 'mechanism off' must hold numbers, got (0.1, nan, 0.2): "
            "a control that has measured nothing (NaN) cannot break a bound",
        ),
        (
            lambda: Control("", 0.1),
            "control.name must say what was run in the method's place, got ''",
        ),
        (lambda: Control("off", []), "control.values must hold at least one number, got none"),
        (lambda: Control("off", [False]), OURS.replace("ours", "control.values") + " False"),
        (lambda: count(control=("off", 0.1)), "control must be a Control, got ('off', 0.1)"),
        (
            lambda: count(paper="-"),
            "paper must give the number that 'as-counted' is held against, got '-'",
        ),
        (
            lambda: effect(id="It works"),
            "id must be kebab-case, such as 'more-seeds', got 'It works'",
        ),
        (lambda: effect(id=""), "id must be kebab-case, such as 'more-seeds', got ''"),
        (lambda: effect(text=" "), "text must say what 'it-works' claims, got ''"),
        (lambda: effect(expected="no"), "expected must be True or False, got 'no'"),
        (lambda: check_claims([]), "claims must hold at least one claim, got none"),
        (
            lambda: check_claims([effect(), effect([2, 3, 4])]),
            "claims must have ids of their own, got 'it-works' more than once",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


def test_the_evidence_machinery_is_imported_in_a_moment():
    code = """
import torch, time
start = time.process_time()
import shuffle_nb.foundations.claims, shuffle_nb.foundations.reference, shuffle_nb.foundations.costs
print(time.process_time() - start)
"""
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.1
