"""Reference values: tensors from formulas, results beside the authors', files that are refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_record
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from shuffle_nb.foundations import reference
from shuffle_nb.foundations.reference import (
    AGREEMENT_FILE,
    Agreement,
    agreement,
    build_tensor,
    find_difference,
    load_reference,
    reference_files,
)

SLUGS = sorted(reference_files())
numbers = st.floats(-10, 10).filter(lambda x: x == 0 or abs(x) > 1e-3)


WAVE = {"shape": [2, 2], "wave": "sin", "scale": 1.5, "frequency": 1.0, "phase": 0.5}


def told(values, shape=None, stored=None):
    """What a file says of a result; of only the first eight values unless all are stored."""
    values = [float(value) for value in values]
    written = [float(f"{value:.10g}") for value in values]
    sums = {
        "sum": math.fsum(values),
        "abs_sum": math.fsum(map(abs, values)),
        "cos_sum": math.fsum(value * math.cos(i) for i, value in enumerate(values)),
    }
    sums = {kind: float(f"{value:.10g}") for kind, value in sums.items()}
    result = {"shape": shape or [len(values)], "first": written[:8]} | sums
    return result if stored == "first" else result | {"values": written}


def stored_file(folder, slug="paper", **changes):
    """Write a reference file of one case with the results `output` and `loss`."""
    case = {
        "name": "two rows", "call": "f(x)", "settings": {"power": 2}, "weights_map": {"w": "W"},
        "tensors": {"x": WAVE},
        "expected": {"output": told([0.5, -1.25, 2.0, 0.125], [2, 2]), "loss": told([3.5], [])},
        "atol": 1e-8, "rtol": 1e-6,
    } | changes  # fmt: skip
    if case["expected"]["loss"]["shape"] == [1]:
        case["expected"]["loss"]["shape"] = []
    whole = {"paper": slug, "made_by": "a repository", "notes": "none", "cases": [case]}
    path = folder / f"{slug}.reference.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


@pytest.fixture
def case(tmp_path):
    """One case with two results."""
    stored_file(tmp_path)
    return load_reference("paper", tmp_path)["two rows"]


RIGHT = {"output": torch.tensor([[0.5, -1.25], [2.0, 0.125]]), "loss": 3.5}


# Tensors


def test_a_wave_is_what_numpy_gives_bit_for_bit():
    for wave in ("sin", "cos"):
        recipe = {"shape": [3, 1, 5], "scale": 0.7, "frequency": 1.37, "phase": 0.6, "wave": wave}
        i = np.arange(15)
        built = build_tensor(recipe)
        plain = 0.7 * getattr(np, wave)(1.37 * i + 0.6)
        assert built.dtype == torch.float64 and built.shape == (3, 1, 5)
        assert np.array_equal(built.numpy().ravel(), plain)
        shifted = build_tensor(recipe | {"offset": 0.3})
        assert np.array_equal(shifted.numpy().ravel(), 0.3 + plain)


@given(st.lists(st.integers(1, 4), max_size=3), numbers, numbers, numbers, numbers)
def test_entry_i_is_the_formula_at_i(shape, scale, frequency, phase, offset):
    recipe = {"shape": shape, "scale": scale, "frequency": frequency, "phase": phase}
    built = build_tensor(recipe | {"wave": "cos", "offset": offset}).flatten()
    for i, value in enumerate(built.tolist()):
        assert value == pytest.approx(offset + scale * math.cos(frequency * i + phase), abs=1e-12)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        ({"shape": [3], "values": [0, 5, 2]}, torch.int64),
        ({"shape": [3], "values": [0, 5, 2], "dtype": "float64"}, torch.float64),
        ({"shape": [3], "values": [0, 5, 2], "dtype": "int64"}, torch.int64),
        ({"shape": [3], "values": [0.0, 5.5, 2]}, torch.float64),
        ({"shape": [3], "values": [True, False, True]}, torch.bool),
        ({"shape": [0, 3], "values": []}, torch.float64),
        ({"shape": [0], "values": [], "dtype": "int64"}, torch.int64),
        ({"shape": [], "values": [7]}, torch.int64),
    ],
)
def test_values_keep_their_kind(recipe, dtype):
    built = build_tensor(recipe)
    assert built.dtype == dtype and list(built.shape) == recipe["shape"]
    assert built.flatten().tolist() == recipe["values"]


# The files of the package


@pytest.mark.parametrize("slug", SLUGS)
def test_every_file_loads_and_agrees_with_itself(slug):
    found = load_reference(slug)
    assert len(found) == len(list(found)) == len({case.name for case in found}) > 0
    for case in found:
        assert found[case.name] is case and case.slug == slug
        assert case.call and case.made_by and case.expected
        for name, tensor in case.tensors.items():
            assert list(tensor.shape) == case.recipes[name]["shape"]
            assert tensor.dtype in (torch.float64, torch.int64, torch.bool)
        whole = {
            name: torch.tensor(expected["values"]).reshape(expected["shape"])
            for name, expected in case.expected.items()
            if "values" in expected
        }
        assert all(one.agrees for one in case.differences(whole))


@pytest.mark.parametrize("slug", SLUGS)
def test_a_file_lies_beside_the_module_of_its_name(slug):
    assert reference_files()[slug].with_name(f"{slug}.py").is_file()


@pytest.mark.parametrize("slug", SLUGS)
def test_one_digit_of_a_listed_value_is_noticed_when_the_file_is_loaded(tmp_path, slug):
    path = reference_files()[slug]
    whole = json.loads(path.read_text(encoding="utf-8"))
    for case in whole["cases"]:
        results = [one for one in case["expected"].values() if "sum" in one]
        listed = [one["values"] for one in results if any(one.get("values", []))]
        for values in listed[:3]:
            before = max(values, key=abs)
            digits = repr(before)
            place = next(i for i, char in enumerate(digits) if char in "123456789")
            other = str(int(digits[place]) % 9 + 1)
            index = values.index(before)
            values[index] = float(digits[:place] + other + digits[place + 1 :])
            (tmp_path / path.name).write_text(json.dumps(whole), encoding="utf-8")
            with pytest.raises(ValueError, match="contradicts itself"):
                load_reference(slug, tmp_path)
            values[index] = before


# Near enough


def allowed(theirs, atol=1e-8, rtol=1e-6):
    return atol + rtol * abs(theirs)


@given(st.lists(numbers, min_size=1, max_size=30), st.data(), st.sampled_from(["first", "all"]))
def test_values_that_are_all_near_enough_are_never_refused_for_their_sums(theirs, data, stored):
    written = [float(f"{value:.10g}") for value in theirs]
    signs = data.draw(
        st.lists(st.sampled_from([-1, 1]), min_size=len(theirs), max_size=len(theirs))
    )
    ours = [t + 0.99 * sign * allowed(t) for t, sign in zip(written, signs, strict=True)]
    found = find_difference("output", ours, told(written, stored=stored), 1e-8, 1e-6)
    assert found.agrees and found.size <= found.allowed


@given(st.lists(numbers, min_size=1, max_size=30), st.data(), st.sampled_from([-1, 1]))
def test_one_value_beyond_its_tolerance_is_found(theirs, data, sign):
    place = data.draw(st.integers(0, len(theirs) - 1))
    ours = [float(f"{value:.10g}") for value in theirs]
    ours[place] += 1.01 * sign * allowed(ours[place])
    found = find_difference("output", ours, told(theirs), 1e-8, 1e-6)
    assert not found.agrees and found.place == f"[{place}]"


@given(st.lists(numbers, min_size=9, max_size=40), st.data())
def test_a_value_that_is_not_stored_cannot_be_far_off(theirs, data):
    place = data.draw(st.integers(8, len(theirs) - 1))
    ours = list(theirs)
    ours[place] += 1.01 * sum(map(allowed, theirs)) + 1e-8 * sum(map(abs, theirs))
    found = find_difference("output", ours, told(theirs, stored="first"), 1e-8, 1e-6)
    assert not found.agrees and found.place in ("sum", "abs_sum", "cos_sum")


def test_values_that_changed_places_are_found_though_their_sums_are_right():
    theirs = [float(i) for i in range(20)]
    ours = [*theirs[:12], theirs[13], theirs[12], *theirs[14:]]
    found = find_difference("output", ours, told(theirs, stored="first"), 1e-8, 1e-6)
    assert found.place == "cos_sum" and not found.agrees


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 10])
def test_what_is_no_number_never_agrees(wrong, place):
    ours = [1.0] * 12
    ours[place] = wrong
    found = find_difference("output", ours, told([1.0] * 12, stored="first"), 1e-8, 1e-6)
    assert not found.agrees and found.size == math.inf


def test_sums_alone_and_shapes_alone_are_compared_too():
    only_sum = {"shape": [4], "sum": 98, "values": [98, 0, 0, 0]}
    assert find_difference("n", [98, 0, 0, 0], only_sum, 0, 0).agrees
    assert not find_difference("n", [97, 1, 0, 0], only_sum, 0, 0).agrees
    assert find_difference("n", [1.0, 2.0], {"shape": [2]}, 0, 0).place == "shape"
    assert find_difference("n", [], {"shape": [0], "values": [], "sum": 0}, 0, 0).agrees


# One case


@pytest.mark.parametrize(
    "output",
    [
        RIGHT["output"],
        RIGHT["output"].double().requires_grad_(),
        RIGHT["output"].bfloat16(),
        RIGHT["output"].half(),
        RIGHT["output"].numpy(),
        RIGHT["output"].t().contiguous().t(),
        RIGHT["output"].tolist(),
    ],
    ids=["float32", "with gradient", "bfloat16", "half", "array", "strides", "list"],
)
def test_a_result_may_be_of_any_dtype(case, output, recwarn):
    case.compare({"loss": np.float32(3.5)}, output=output)
    assert not recwarn


def test_whole_numbers_and_masks_are_results_too(tmp_path):
    expected = {"mask": told([1, 0, 1]), "ids": told([3, 1, 2]), "loss": told([3.5], [])}
    stored_file(tmp_path, expected=expected)
    (case,) = load_reference("paper", tmp_path)
    case.compare(mask=torch.tensor([True, False, True]), ids=torch.tensor([3, 1, 2]))
    with pytest.raises(AssertionError, match=r"mask differs by 1 at \[1\]"):
        case.compare(mask=torch.tensor([True, True, True]))


def test_the_table_sets_both_numbers_side_by_side(case, capsys):
    case.compare(RIGHT)
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    assert lines[0] == ["result", "at", "theirs", "ours", "largest", "difference", "allowed"]
    assert lines[2] == ["output", "[0,", "0]", "0.5", "0.5", "0", "5.1e-07"]
    assert lines[3] == ["loss", "-", "3.5", "3.5", "0", "3.5e-06"] and printed.err == ""


def test_a_notebook_shows_one_table_and_nothing_else(case):
    InteractiveShell.instance()
    try:
        with capture_output() as captured:
            case.compare(RIGHT)
    finally:
        InteractiveShell.clear_instance()
    (output,) = captured.outputs
    assert set(output.data) == {"text/html", "text/plain"} and "<table>" in output.data["text/html"]
    assert captured.stdout == captured.stderr == ""


def test_a_difference_is_shown_and_raised(case, capsys):
    ours = RIGHT["output"].double().clone()
    ours[0, 1] += 0.001
    with pytest.raises(AssertionError) as caught:
        case.compare(output=ours, loss=3.5)
    assert str(caught.value) == (
        "paper, case 'two rows': output differs by 0.001 at [0, 1] "
        "(theirs -1.25, ours -1.249), allowed is 1.3e-06"
    )
    assert "-1.249" in capsys.readouterr().out


def test_tensors_settings_and_maker_come_with_the_case(case):
    assert case.tensors["x"].tolist()[0][0] == 1.5 * np.sin(0.5) and case.settings == {"power": 2}
    assert (case.made_by, case.weights_map, case.call) == ("a repository", {"w": "W"}, "f(x)")
    assert len(repr(case)) < 100


def test_a_case_may_name_its_own_maker(tmp_path):
    stored_file(tmp_path, made_by="a loop")
    found = load_reference("paper", tmp_path)
    assert found.made_by == "a repository" and found["two rows"].made_by == "a loop"


def test_another_shape_is_a_disagreement(case):
    with pytest.raises(AssertionError) as caught:
        case.compare(output=RIGHT["output"].flatten())
    assert str(caught.value) == (
        "paper, case 'two rows': output has shape [4], the authors' has [2, 2]"
    )


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda case: case.compare(outptu=1.0),
            "result 'outptu' is none of case 'two rows'; nearest: 'output', 'loss'",
        ),
        (lambda case: case.compare(), "results must be given once each, at least one, got none"),
        (
            lambda case: case.compare({"loss": 3.5}, loss=3.5),
            "results must be given once each, at least one, got 'loss' twice",
        ),
        (
            lambda case: case.compare(loss="3.5"),
            "result 'loss' must be a tensor, an array or a number, got str of <U3",
        ),
        (
            lambda case: case.compare(loss=torch.tensor(3.5j)),
            "result 'loss' must be a tensor, an array or a number, got Tensor of complex64",
        ),
        (
            lambda case: case.compare(loss=None),
            "result 'loss' must be a tensor, an array or a number, got NoneType of object",
        ),
    ],
)
def test_bad_results(case, call, message):
    with pytest.raises(ValueError) as caught:
        call(case)
    assert str(caught.value) == message


def test_unknown_names_bring_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"^no reference values for 'snk'; nearest: 'snnk', "):
        load_reference("snk")
    stored_file(tmp_path)
    message = r"^paper has no reference case 'two row'; nearest: 'two rows'$"
    with pytest.raises(ValueError, match=message):
        load_reference("paper", tmp_path)["two row"]
    with pytest.raises(ValueError, match=r"^no reference values for 'x'; nearest: none$"):
        load_reference("x", tmp_path / "empty")


# Files that are refused

ONE_DIGIT = (
    "paper.reference.json contradicts itself (has a digit changed?): case 'two rows', "
    "result 'output': its sum is 1.375, its values give 1.475"
)


def changed(**changes):
    return {"expected": {"output": told([0.5, -1.25, 2.0, 0.125], [2, 2]) | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (changed(first=[0.5, -1.25, 2.1, 0.125], values=[0.5, -1.25, 2.1, 0.125]), ONE_DIGIT),
        (changed(values=[0.5, -1.25, 2.1, 0.125]), "first values are not those of its list"),
        (changed(sum=1.376), "its sum is 1.376, its values give 1.375"),
        (changed(abs_sum=3.975), "its abs_sum is 3.975, its values give 3.875"),
        (changed(cos_sum=-1.14144), "its cos_sum is -1.14144, its values give"),
        (changed(shape=[2, 3]), "its shape asks for 6 values, there are 4"),
        (changed(sum=math.nan), "a number is not finite"),
        ({"expected": {"output": told(range(9), stored="first") | {"abs_sum": 27.0}}},
         "its abs_sum is less than its values add up to"),
        ({"rtol": 0.1}, "case 'two rows': atol and rtol must be from 0 to 0.001"),
        ({"atol": -1e-8}, "case 'two rows': atol and rtol must be from 0 to 0.001"),
        ({"tensors": {"x": {"shape": [3], "values": [1, 2]}}},
         "case 'two rows', tensor 'x': its shape asks for 3 values"),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(tmp_path, changes, message):
    path = stored_file(tmp_path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["cases"][0] |= changes
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_reference("paper", tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_cases_of_one_name_are_refused(tmp_path):
    path = stored_file(tmp_path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    whole["cases"] *= 2
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match=r"two cases are named 'two rows'$"):
        load_reference("paper", tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"cases": [{}], "made_by": "", "notes": ""}']
)
def test_what_is_no_reference_file_is_refused(tmp_path, text):
    (tmp_path / "paper.reference.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^paper\.reference\.json is not a reference file: "):
        load_reference("paper", tmp_path)


# How many cases agree


def record(folder, text):
    path = folder / "reference_agreement.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def test_the_record_says_how_many_cases_agree_and_how_nearly(tmp_path):
    names = [case.name for case in load_reference("snnk")]
    near = {name: {"difference": 1e-10 * (i + 1), "allowed": 1e-6} for i, name in enumerate(names)}
    found = agreement("snnk", record(tmp_path, {"snnk": near}))
    assert found == Agreement(len(names), len(names), 1e-10 * len(names))
    count = len(names)
    assert str(found) == f"{count} of {count} reference cases agree, largest error 4e-10"


def test_a_case_that_is_not_recorded_or_beyond_what_is_allowed_does_not_agree(tmp_path):
    first, second, *rest = (case.name for case in load_reference("snnk"))
    known = {
        first: {"difference": 2e-10, "allowed": 1e-6},
        second: {"difference": 2e-3, "allowed": 1e-6},
        "a case that is gone": {"difference": 0.0, "allowed": 1e-6},
    }
    found = agreement("snnk", record(tmp_path, {"snnk": known}))
    assert found == Agreement(1, 2 + len(rest), 2e-10)
    for text in ({}, {"snnk": {}}):
        assert str(agreement("snnk", record(tmp_path, text))) == "0 of 4 reference cases agree"
    assert agreement("snnk", tmp_path / "nowhere.json").agree == 0


def test_a_paper_without_reference_values_says_so():
    assert str(agreement("no_such_paper")) == "no reference cases"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"snnk": 3}', '{"snnk": {"bundle and closed form": 1}}']
)
def test_a_damaged_record_is_one_sentence(tmp_path, text):
    message = r"^reference_agreement\.json is damaged, call make reference: .*"
    with pytest.raises(ValueError, match=message):
        agreement("snnk", record(tmp_path, text))


def test_what_is_recorded_is_of_cases_that_exist():
    for slug, known in json.loads(AGREEMENT_FILE.read_text(encoding="utf-8")).items():
        assert set(known) <= {case.name for case in load_reference(slug)}
        for one in known.values():
            assert 0 <= one["difference"] <= one["allowed"]
            assert one == {name: float(f"{number:.2g}") for name, number in one.items()}


@pytest.mark.parametrize("slug", SLUGS)
def test_every_case_beside_a_module_is_recorded_and_agrees(slug):
    found = agreement(slug)
    assert found.agree == found.cases > 0, f"{found}; call make reference"


@pytest.fixture
def recorded_here(tmp_path, monkeypatch, request):
    """`agree`, and a record of its own."""
    monkeypatch.setattr(reference, "AGREEMENT_FILE", tmp_path / "reference_agreement.json")
    if request.config.pluginmanager.get_plugin("tests.reference_record"):
        pytest.skip("this test is about an ordinary run")
    return request.getfixturevalue("agree")


def test_agree_demands_every_result_and_a_record(case, tmp_path, recorded_here):
    agree = recorded_here
    with pytest.raises(AssertionError, match=r"paper, case 'two rows': no result for loss"):
        agree(case, {"output": RIGHT["output"]})
    with pytest.raises(AssertionError, match="nothing is recorded: call make reference"):
        agree(case, RIGHT)
    record(tmp_path, {"paper": {"two rows": {"difference": 0.0, "allowed": 1e-9}}})
    agree(case, RIGHT)
    near = RIGHT | {"loss": 3.5 + 1e-8}
    with pytest.raises(AssertionError, match=r"loss differs by 1e-08, recorded is "):
        agree(case, near)
    record(tmp_path, {"paper": {"two rows": {"difference": 0.0, "allowed": 3.5e-6}}})
    agree(case, near)
    with pytest.raises(AssertionError, match=r"loss differs by 0\.1 at"):
        agree(case, RIGHT | {"loss": 3.6})


def test_make_reference_keeps_the_largest_difference_of_what_agreed(tmp_path, monkeypatch):
    first, second, third, *_ = load_reference("snnk")
    path = record(
        tmp_path,
        {"gone": {"x": {}}, "snnk": {third.name: {"difference": 0.0, "allowed": 1.0}, "old": {}}},
    )
    monkeypatch.setattr(reference, "AGREEMENT_FILE", path)
    monkeypatch.setattr(reference_record, "KEPT", {})
    for case in (first, second):
        reference_record.begin(case)
    for ours in (1.00000123456, 1.00000012345):
        near = find_difference("output", [ours], told([1.0]), first.atol, first.rtol * 10)
        reference_record.keep(first, near)
    reference_record.pytest_sessionfinish()
    known = {third.name: {"difference": 0.0, "allowed": 1.0}}
    known[first.name] = {"difference": 1.2e-6, "allowed": float(f"{1e-8 + 1e-5:.2g}")}
    assert json.loads(path.read_text()) == {"snnk": known}
    assert list(json.loads(path.read_text())["snnk"]) == sorted(known)
    assert not list(Path(tmp_path).glob("*.tmp"))


def test_reading_the_record_loads_no_torch():
    code = """
import sys
from shuffle_nb.foundations.reference import agreement
agreement("snnk")
assert not {"torch", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
