"""Every notebook runs from top to bottom with its default parameters, and its claims hold."""

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from ipywidgets import Checkbox, IntSlider
from matplotlib.figure import Figure

from shuffle_nb.runner.catalogue import is_paper, read_cells, read_paper, stored_claims
from shuffle_nb.runner.execute import execute, prepare

ROOT = Path(__file__).parents[1] / "nbs"
NOTEBOOKS = [
    path
    for path in sorted([*ROOT.glob("*.ipynb"), *ROOT.glob("*/*.ipynb")])
    if any(cell["cell_type"] == "code" for cell in read_cells(path))
]

# Runs as the last cell of each paper, in the kernel that has just run the notebook. It does what a
# reader does: it moves each control of each explorer, and looks whether the picture changes.
TURN_EVERY_CONTROL = """
def _turn_every_control():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def picture(explorer):
        canvas = FigureCanvasAgg(explorer.figure)
        canvas.draw()
        return canvas.get_width_height(), bytes(canvas.buffer_rgba())

    def other_value(control):
        if hasattr(control, "options"):
            values = [o[1] if isinstance(o, tuple) else o for o in control.options]
            return next(value for value in values if value != control.value)
        if isinstance(control.value, bool):
            return not control.value
        if hasattr(control, "lower"):
            low, high = control.value
            step = control.step or 1
            return (low, high - step) if high - step > low else (low, high + step)
        if hasattr(control, "max"):
            return control.max if control.value != control.max else control.min
        raise AssertionError(f"no other value known for a {type(control).__name__}")

    explorers = {name: value for name, value in globals().items() if name.startswith("explorer")}
    assert explorers, "no variable named explorer..."
    for explorer_name, explorer in explorers.items():
        first = picture(explorer)
        for name, control in explorer.controls.items():
            before, control.value = control.value, other_value(control)
            changed = picture(explorer)
            print(f"{explorer_name}.{name}: {before!r} -> {control.value!r}")
            assert changed != first, f"{explorer_name}: {name} changes nothing"
            control.value = before
            assert picture(explorer) == first, f"{explorer_name}: {name} does not come back"


_turn_every_control()
"""


def test_a_control_that_changes_nothing_is_noticed():
    def draw(alive, dead):
        figure = Figure()
        figure.subplots().plot([0, alive])
        return figure

    controls = {"alive": IntSlider(value=1, max=3), "dead": Checkbox()}
    explorer = SimpleNamespace(controls=controls)

    def redraw(change=None):
        explorer.figure = draw(**{name: control.value for name, control in controls.items()})

    redraw()
    for control in controls.values():
        control.observe(redraw, names="value")
    with pytest.raises(AssertionError, match="explorer: dead changes nothing"):
        exec(TURN_EVERY_CONTROL, {"explorer": explorer})
    with pytest.raises(AssertionError, match="no variable named explorer"):
        exec(TURN_EVERY_CONTROL, {})


@pytest.mark.parametrize(
    "source", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT).with_suffix(""))
)
def test_notebook_runs(source, tmp_path, monkeypatch, record_property):
    paper = read_paper(source, strict=False)
    notebook = nbformat.reads(prepare(paper, {}), as_version=4)
    if is_paper(source, ROOT):
        notebook.cells.append(nbformat.v4.new_code_cell(TURN_EVERY_CONTROL))
    copy = tmp_path / source.name
    nbformat.write(notebook, copy)
    monkeypatch.chdir(tmp_path)  # a notebook must not depend on where it runs

    result = execute(copy, paper.slug)

    record_property(f"seconds of {source.relative_to(ROOT)}", f"{result.seconds:5.1f}")
    # Only a paper's claims must hold: the foundations show what happens to one that does not.
    fine = result.ok or (result.status == "not held" and not is_paper(source, ROOT))
    assert fine, f"{result.status} at {result.where}\n{result.error}"
    cells = nbformat.read(copy, as_version=4).cells
    for cell in cells:
        if cell.cell_type == "code" and cell.source.strip():
            assert cell.execution_count, f"was not executed: {cell.source}"
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", (
                f"{output['text']}\n... came from:\n{cell.source}"
            )
    if is_paper(source, ROOT):
        assert_claims(result.claims, source)
        assert any("solution" in cell.metadata.get("tags", []) for cell in cells)


def assert_claims(claims, source):
    """They are emitted, hold, and are the ones that the committed notebook shows."""
    assert claims, "no claims were emitted"
    missed = [claim for claim in claims if not claim["holds"]]
    assert not missed, json.dumps(missed, indent=1)
    stored = stored_claims(read_cells(source))
    assert [claim["text"] for claim in claims] == [claim["text"] for claim in stored], (
        "the committed notebook holds other claims: shuffle-nb refresh"
    )
