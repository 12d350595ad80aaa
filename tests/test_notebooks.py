"""Every notebook runs from top to bottom with its default parameters, and its claims hold."""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from after_a_notebook import try_wrong_answers, turn_every_control
from ipywidgets import Checkbox, IntSlider
from jupyter_client.provisioning import local_provisioner
from warm_kernels import WarmKernels

from shuffle_nb.foundations import figures
from shuffle_nb.foundations.exercises import Exercise
from shuffle_nb.runner.catalogue import is_paper, read_cells, read_paper, stored_claims
from shuffle_nb.runner.execute import execute, prepare

TESTS = Path(__file__).parent
ROOT = TESTS.parent / "nbs"
NOTEBOOKS = [
    path
    for path in sorted([*ROOT.glob("*.ipynb"), *ROOT.glob("*/*.ipynb")])
    if any(cell["cell_type"] == "code" for cell in read_cells(path))
]
STARTS_COLD = "shuffles/01_token_shuffle"  # so that one notebook shows what a user's kernel does
WIDGETS = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="session")
def warm_kernels():
    """Kernels forked from a process with the libraries loaded; None where that is not safe."""
    if sys.platform != "linux" or torch.accelerator.is_available():
        yield None
        return
    with contextlib.closing(WarmKernels(local_provisioner.launch_kernel)) as kernels:
        yield kernels


@pytest.mark.parametrize(
    "source", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT).with_suffix(""))
)
def test_notebook_runs(source, tmp_path, monkeypatch, record_property, warm_kernels):
    place = source.relative_to(ROOT).with_suffix("").as_posix()
    paper = read_paper(source, strict=False)
    wrong_answers = TESTS / source.parent.name / f"wrong_answers_{paper.slug}.py"
    notebook = json.loads(prepare(paper, {}))
    notebook["cells"].append(last_cell(wrong_answers if wrong_answers.exists() else None))
    copy = tmp_path / source.name
    copy.write_text(json.dumps(notebook), encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # a notebook must not depend on where it runs
    if warm_kernels is not None and place != STARTS_COLD:
        monkeypatch.setattr(local_provisioner, "launch_kernel", warm_kernels.launch)

    result = execute(copy, paper.slug)

    # Only a paper's claims must hold: the foundations show what happens to one that does not.
    fine = result.ok or (result.status == "not held" and not is_paper(source, ROOT))
    assert fine, f"{result.status} {result.where}\n{result.error}"
    *cells, last = read_cells(copy)
    for cell in cells:
        if cell["cell_type"] == "code" and cell["source"].strip():
            assert cell["execution_count"], f"was not executed: {cell['source']}"
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", (
                f"{output['text']}\n... came from:\n{cell['source']}"
            )
            assert WIDGETS not in output.get("data", {}), "a page without a kernel has a control"
    found = {"training": None}
    if result.ok:
        found = json.loads("".join(last["outputs"][-1]["text"]))
    record_property(place, sizes(read_cells(source)) | found | {"seconds": result.seconds})
    if is_paper(source, ROOT):
        assert found["controls"], "no explorer, or one without controls"
        assert_claims(result.claims, source)
    if is_paper(source, ROOT) or found.get("checks"):
        assert_exercises(cells, found["checks"], wrong_answers)


def last_cell(wrong_answers):
    """The cell in which a notebook is looked back at, in the kernel that has just run it."""
    path = None if wrong_answers is None else str(wrong_answers)
    source = f"__import__('runpy').run_path({str(TESTS / 'after_a_notebook.py')!r})"
    return {
        "cell_type": "code",
        "id": "look-back",
        "metadata": {},
        "source": f"{source}['look_back'](globals(), {path!r})",
        "outputs": [],
        "execution_count": None,
    }


def assert_claims(claims, source):
    """There are some, and they are the ones that the committed notebook shows."""
    assert claims, "no claims were emitted"
    stored = stored_claims(read_cells(source))
    assert [claim["id"] for claim in claims] == [claim["id"] for claim in stored], (
        "the committed notebook holds other claims: shuffle-nb refresh"
    )


def assert_exercises(cells, checks, wrong_answers):
    """Each check rejects wrong answers, and passes a solution that is folded, output and all."""
    assert checks, "no exercise: your_turn registers none"
    assert wrong_answers.exists(), f"needs {wrong_answers.relative_to(TESTS.parent)}"
    solutions = [cell for cell in cells if "solution" in cell["metadata"].get("tags", [])]
    for cell in solutions:
        assert cell["metadata"].get("jupyter") == {"source_hidden": True, "outputs_hidden": True}
        assert "#| code-fold: true\n#| code-summary: Solution\n" in cell["source"], cell["source"]
    for check in checks:
        assert any(f"{check}(" in cell["source"] for cell in solutions), (
            f"no solution calls {check}"
        )


@pytest.mark.parametrize(
    "source", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT).with_suffix(""))
)
def test_no_control_is_stored_in_a_notebook(source):
    stored = json.loads(source.read_text(encoding="utf-8"))
    views = [
        cell["source"]
        for cell in stored["cells"]
        for output in cell.get("outputs", [])
        if WIDGETS in output.get("data", {})
    ]
    assert not views and "widgets" not in stored["metadata"], "shuffle-nb refresh"


def sizes(cells):
    """What a reader has before them: words, code lines, long cells, where the first result is."""
    prose = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    shown = [
        lines_of(cell["source"])
        for cell in code
        if not cell["source"].startswith(("#| export\n", "#| hide"))
        and not cell["metadata"].get("jupyter", {}).get("source_hidden")
    ]
    experiment = next(
        (i for i, c in enumerate(cells) if "## Experiment" in c["source"]), len(cells)
    )
    pictures = [
        place
        for place, cell in enumerate(cells)
        if place > experiment
        and any(
            {"image/png", "text/html"} & set(o.get("data", {})) for o in cell.get("outputs", [])
        )
    ]
    return {
        "words": sum(len(text.split()) for text in prose),
        "lines": sum(lines_of(cell["source"]) for cell in code),
        "long": sum(lines > 15 for lines in shown) / max(1, len(shown)),
        "first": min(pictures, default=None),
    }


def lines_of(source):
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines())


# The checks above are themselves checked.


def explorer_of(draw):
    controls = {"alive": IntSlider(value=1, max=3), "dead": Checkbox()}
    return figures.Explorer(draw, controls)


def line(height):
    figure, axis = figures.subplots()
    axis.plot([0, height])
    return figure


def test_a_control_that_changes_nothing_is_noticed():
    explorer = explorer_of(lambda alive, dead: line(alive))
    with pytest.raises(AssertionError, match="explorer: dead = True changes nothing"):
        turn_every_control({"explorer": explorer}, figures.Explorer)
    explorer = explorer_of(lambda alive, dead: line(alive + dead / 2))
    assert turn_every_control({"explorer": explorer}, figures.Explorer) == 2
    assert explorer.controls["dead"].value is False


def test_an_explorer_that_draws_by_chance_is_noticed():
    explorer = explorer_of(lambda alive, dead: line(torch.rand(()).item()))
    with pytest.raises(AssertionError, match="explorer: drawn again, it is another picture"):
        turn_every_control({"explorer": explorer}, figures.Explorer)


THREE = "def check_double__is_three(x): return 3\n"
WRONG = {
    "accepts": (
        THREE + "def check_double__adds_one(x): return x + 1",
        "accepts check_double__adds",
    ),
    "too few": (THREE, "needs two named wrong answers in .*, got .'check_double__is_three'"),
    "unknown": (
        THREE + "def check_duoble__is_four(x): return 4",
        "to no exercise: .'check_double'",
    ),
    "silent": (THREE + "def check_double__is_0(x): return 0", "rejects .*_is_0 without a sentence"),
}


@pytest.mark.parametrize(("source", "message"), WRONG.values(), ids=WRONG)
def test_a_check_that_accepts_too_much_is_noticed(source, message, tmp_path):
    def check_double(answer):
        if answer(1) == 0:
            raise AssertionError
        assert answer(1) == 2, "twice one is two"

    path = tmp_path / "wrong.py"
    path.write_text(source)
    exercises = {"check_double": Exercise("double", check_double, "hint", 1, "easy")}
    with pytest.raises(AssertionError, match=message):
        try_wrong_answers({}, exercises, str(path))


def test_wrong_answers_may_use_the_names_of_the_notebook(tmp_path):
    def check_double(answer):
        assert answer(1) == 2, "twice one is two"

    path = tmp_path / "wrong.py"
    path.write_text(
        "def check_double__is_three(x): return offset + 3\n"
        "def check_double__is_one(x): return helper(x)\n"
        "def helper(x): return x\n"
    )
    names = {"offset": 0}
    exercises = {"check_double": SimpleNamespace(check=check_double)}
    assert try_wrong_answers(names, exercises, str(path)) == 2
    assert names == {"offset": 0}
