"""Exercises: an open gap is said to be open, wrong answers what is wrong; solutions stay folded."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from shuffle_nb.foundations import exercises
from shuffle_nb.foundations.exercises import folding_exporter, your_turn

ROOT = Path(__file__).parents[2]


def check_double(answer):
    assert answer(2) == 4, "twice 2 is 4"
    assert answer(-1) == -2, "twice -1 is -2"


@pytest.fixture
def shown(monkeypatch):
    """What a reader gets to see."""
    seen = []
    monkeypatch.setattr("IPython.display.display", seen.append)
    monkeypatch.setattr(exercises, "EXERCISES", {})
    return seen


def ask(function, check=check_double, **options):
    options = {"hint": "Add it to itself.", "minutes": 2, "difficulty": "easy"} | options
    return your_turn(check, **options)(function)


def nothing(x): ...


def a_docstring(x):
    """Only words."""


def dots(x):
    return ...


def lines_that_are_given(x):
    y = x + x  # noqa: F841


@pytest.mark.parametrize("gap", [nothing, a_docstring, dots, lines_that_are_given])
def test_an_open_gap_is_said_to_be_open_and_nothing_is_raised(gap, shown):
    assert ask(gap) is gap
    (message,) = shown
    task = f"Your turn (easy, about 2 minutes): fill the gap in `{gap.__name__}`."
    assert repr(message) == f"{task}\nHint: Add it to itself."


def test_the_hint_is_folded_in_html_and_its_signs_are_safe(shown):
    ask(nothing, hint="`a < b` <script>", minutes=1)
    page = shown[0]._repr_html_()
    assert "<details><summary>Hint</summary><code>a &lt; b</code> &lt;script&gt;</details>" in page
    assert "about a minute" in page and "<code>nothing</code>" in page


def test_a_right_answer_is_told_so(shown):
    assert ask(lambda x: 2 * x)(3) == 6
    assert "Right: `<lambda>` passes `check_double`." in repr(shown[0])
    assert "details" not in shown[0]._repr_html_()


def test_a_wrong_answer_is_told_what_is_wrong(shown):
    with pytest.raises(AssertionError, match="twice -1 is -2"):
        ask(lambda x: x * x)
    assert not shown


def test_a_mistake_in_the_readers_lines_comes_to_the_reader(shown):
    def misspelt(x):
        return xx

    with pytest.raises(NameError, match="'xx' is not defined"):
        ask(misspelt)
    assert not shown


def test_a_check_that_catches_errors_does_not_hide_an_open_gap(shown):
    def check_refuses(answer):
        try:
            answer(-1)
        except Exception:
            return
        raise AssertionError("-1 must be refused")

    ask(nothing, check_refuses)
    assert "Your turn" in repr(shown[0])


def test_an_answer_may_be_false_zero_or_empty(shown):
    def check_any(answer):
        assert answer() in (False, 0, [])

    for value in (False, 0, []):
        ask(lambda value=value: value, check_any)
    assert all("Right" in repr(message) for message in shown)


def test_an_exercise_is_known_by_its_check(shown):
    ask(nothing, difficulty="hard", minutes=10)
    exercise = exercises.EXERCISES["check_double"]
    assert (exercise.name, exercise.check, exercise.hint) == (
        "nothing",
        check_double,
        "Add it to itself.",
    )
    assert exercise.effort == "hard, about 10 minutes"


def test_bad_input(shown):
    with pytest.raises(
        ValueError, match="difficulty must be one of easy, medium, hard, got 'hrad'"
    ):
        ask(nothing, difficulty="hrad")
    for minutes in (0, -1):
        with pytest.raises(
            ValueError, match=f"minutes must be a whole number from 1 on, got {minutes}"
        ):
            ask(nothing, minutes=minutes)
    with pytest.raises(ValueError, match="hint must say something"):
        ask(nothing, hint=" ")
    with pytest.raises(ValueError, match="check_nothing never calls the answer"):

        def check_nothing(answer): ...

        ask(lambda x: x, check_nothing)


def test_bad_input_as_a_user_without_shape_checks(shown, plain_python):
    with pytest.raises(ValueError, match="check must be a function of the answer, got 3"):
        ask(nothing, 3)
    with pytest.raises(ValueError, match=r"minutes must be a whole number from 1 on, got 1\.5"):
        ask(nothing, minutes=1.5)
    with pytest.raises(ValueError, match="your_turn stands before a function, got <class"):
        ask(int)


def test_a_terminal_gets_plain_text():
    code = (
        "from shuffle_nb.foundations.exercises import your_turn\n"
        "your_turn(lambda answer: answer(1), hint='Think.', minutes=3, difficulty='medium')"
        "(lambda x: None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "Your turn (medium, about 3 minutes): fill the gap in `<lambda>`.\nHint: Think.\n"
    )


def cell(source, tags=(), **jupyter):
    made = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags), "jupyter": jupyter})
    made.outputs = [nbformat.v4.new_output("stream", text=f"output of {source}")]
    return made


def test_a_page_folds_what_jupyter_folds():
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        cell("in_the_open = 1"),
        cell("set_up = 2", source_hidden=True),
        cell("solved = 3", ["solution"], source_hidden=True, outputs_hidden=True),
    ]
    page, _ = folding_exporter().from_notebook_node(notebook)
    boxes = [part.split("</details>")[0] for part in page.split("<details")[1:]]
    assert len(boxes) == 2
    outside = page
    for box in boxes:
        outside = outside.replace(box, "")
    assert "Code</summary>" in boxes[0] and "set_up" in boxes[0] and "output" not in boxes[0]
    assert "Solution</summary>" in boxes[1] and "solved" in boxes[1] and "output of" in boxes[1]
    assert "in_the_open" in outside and "output of set_up" in outside


def test_cleaning_keeps_the_folds(tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [cell("3", ["solution"], source_hidden=True, outputs_hidden=True)]
    notebook.cells[0].metadata["collapsed"] = True
    path = tmp_path / "folded.ipynb"
    nbformat.write(notebook, path)
    clean = [Path(sys.executable).parent / "nbdev_clean", "--fname", path]
    subprocess.run(clean, cwd=ROOT, check=True, capture_output=True)
    metadata = json.loads(path.read_text())["cells"][0]["metadata"]
    assert metadata == {
        "tags": ["solution"],
        "jupyter": {"source_hidden": True, "outputs_hidden": True},
    }
