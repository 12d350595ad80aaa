"""Parameters: read by their defaults, checked before anything runs, written as they are."""

import re

import nbformat
import pytest

from shuffle_nb.runner.catalogue import find
from shuffle_nb.runner.execute import prepare
from shuffle_nb.runner.many import run_notebook
from shuffle_nb.runner.parameters import check_parameters, fits, read_options, read_value


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 1, 3),
        ("1e-3", 0.1, 1e-3),
        ("1", "text", "1"),
        ("'1'", "text", "1"),
        ("true", False, True),
        ("False", True, False),
        ("[1, 2]", [0], [1, 2]),
        ("abc", 1, "abc"),
        ("None", None, None),
        ("-3", 1, -3),
        ("(0, 1)", [0], (0, 1)),
        ("[[1, -2], []]", [[0]], [[1, -2], []]),
        ("'it\\'s'", "text", "it's"),
        ("'a' or 'b'", "text", "'a' or 'b'"),
        ("{'window': 1}", {}, {"window": 1}),
        ("1e999", 0.1, float("inf")),
        ("(" * 500, [0], "(" * 500),
    ],
)
def test_text_is_read_by_the_type_of_the_default(text, default, value):
    assert read_value(text, default) == value


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        (1, 0.5, True),
        (0.5, 1, False),
        (True, 1, False),
        (1, True, False),
        (True, 0.5, False),
        ("a", "b", True),
        (1, "b", False),
        ([1, 2], [0], True),
        ([1, "a"], [0], False),
        ([0.5], [1], False),
        ([1], [0.5], True),
        ([], [1], True),
        (["a"], [], True),
        (1, [1], False),
        (object(), None, True),
    ],
)
def test_types_are_strict(value, default, expected):
    assert fits(value, default) is expected


PLAIN = """lr = 0.1
seeds = [0]
rates = [0.5]
sizes = (1, 2)
nested = [[0]]
name = "a"
anything = None
layout = {}"""


@pytest.mark.parametrize(
    ("given", "arrives"),
    [
        ({"lr": 1}, {"lr": 1.0}),
        ({"seeds": (0, 1)}, {"seeds": [0, 1]}),
        ({"rates": [1, -2]}, {"rates": [1.0, -2.0]}),
        ({"sizes": [3]}, {"sizes": (3,)}),
        ({"nested": [(1, 2), []]}, {"nested": [[1, 2], []]}),
        ({"name": 'it\'s "quoted"\n{x}\\'}, {"name": 'it\'s "quoted"\n{x}\\'}),
        ({"anything": (1, None, [True])}, {"anything": (1, None, [True])}),
        ({"layout": {"window": (1, 2)}}, {"layout": {"window": (1, 2)}}),
    ],
)
def test_parameters_arrive_as_what_they_are(write, given, arrives):
    paper = find(str(write(parameters=PLAIN)))
    checked = check_parameters(paper, given)
    assert repr(checked) == repr(arrives)
    node = nbformat.reads(prepare(paper, checked), as_version=4)
    found = {}
    exec(node.cells[1].source, found)
    exec(node.cells[2].source, found)
    assert repr({name: found[name] for name in given}) == repr(arrives)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"lr": 10**400},
        {"rates": [1.0, float("inf")]},
        {"anything": object()},
        {"anything": [float("nan")]},
        {"layout": {"window": {1, 2}.__iter__()}},
    ],
)
def test_what_no_notebook_can_say_is_refused(write, given):
    with pytest.raises(ValueError, match="expects finite numbers, text, lists and the like"):
        check_parameters(find(str(write(parameters=PLAIN))), given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"stesp": 1},
            "small has no parameter 'stesp'; did you mean 'steps'? it knows: steps, lr, seeds",
        ),
        ({"zzz": 1}, "small has no parameter 'zzz'; it knows: steps, lr, seeds"),
        ({"steps": "abc"}, "parameter 'steps' of small expects int (default 3), got 'abc'"),
        ({"seeds": ["a"]}, "parameter 'seeds' of small expects list[int] (default [0]), got ['a']"),
    ],
)
def test_a_bad_parameter_is_one_clear_line_and_nothing_is_written(write, tmp_path, given, message):
    paper = find(str(write()))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_notebook(paper, given, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_missing_device_is_refused(write):
    paper = find(str(write(parameters="device = 'auto'")))
    with pytest.raises(ValueError, match="device 'cuda:99' is not available on this machine"):
        check_parameters(paper, {"device": "cuda:99"})
    assert check_parameters(paper, {"device": "cuda:99"}, device_here=False)


def test_a_parameters_cell_that_cannot_be_read_is_named(write):
    with pytest.raises(ValueError, match="tagged 'parameters' is not plain Python"):
        check_parameters(find(str(write(parameters="steps = = 3"))), {"steps": 3})


def test_an_unknown_scale_is_refused(write):
    paper = find(str(write(parameters="scale = 'laptop'")))
    with pytest.raises(ValueError, match="'scale' expects laptop or full, got 'huge'"):
        check_parameters(paper, {"scale": "huge"})


@pytest.mark.parametrize("option", ["steps", "steps=", "=3", "="])
def test_an_option_without_name_or_value_is_refused(option):
    with pytest.raises(ValueError, match="given as name=value"):
        read_options([option])
