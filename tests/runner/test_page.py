"""Pages that need no network."""

import re

import nbformat
import pytest

from shuffle_nb.runner.catalogue import notebook_paths
from shuffle_nb.runner.page import mathml, write_html

PIXEL = "aGk="
WIDGET = "application/vnd.jupyter.widget-view+json"


def output(**data):
    return nbformat.v4.new_output(
        "display_data", {kind.replace("__", "/"): d for kind, d in data.items()}
    )


@pytest.fixture
def page(tmp_path):
    """The page of a notebook that has all that could reach for the network."""
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [
        text("# Title\n\n$x_i^2$ and\n\n$$\\frac{a}{b}$$\n\n\\begin{align}c &= d\\end{align}"),
        text("```mermaid\ngraph TD; A-->B\n```"),
        code("#| fig-alt: 'A dot: \"one\"'\ndraw()", outputs=[output(image__png=PIXEL)]),
        code("latex", outputs=[output(text__latex="$\\alpha$", text__plain="alpha")]),
        code(
            "answer = 42", metadata={"tags": ["solution"]}, outputs=[output(text__plain="hidden")]
        ),
        code("setup = 1", metadata={"jupyter": {"source_hidden": True}}),
        code(
            "explore",
            outputs=[output(image__png=PIXEL, **{WIDGET.replace("/", "__"): {"model_id": "1"}})],
        ),
    ]
    node = nbformat.v4.new_notebook(cells=cells)
    node.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    nbformat.write(node, tmp_path / "all.ipynb")
    return write_html(tmp_path / "all.ipynb").read_text(encoding="utf-8")


def test_nothing_is_fetched(page):
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.https?:", page)
    assert not re.findall(r"https?://(?:cdn|unpkg|cdnjs)", page)
    assert not re.findall(r"@import|url\(['\"]?https?:|import\(|from .https?:", page)
    assert "mathjax" not in page.lower() and "require" not in page and WIDGET not in page


def test_formulas_are_drawn_by_the_browser(page):
    assert page.count("<math") == 4
    assert "<mfrac>" in page and "\\frac" not in page.replace('"\\frac', "")


def test_images_are_inside_and_in_words(page):
    assert page.count(f"data:image/png;base64,{PIXEL}") == 2
    assert "alt='A dot: \"one\"'" in page or 'alt="A dot: &quot;one&quot;"' in page
    assert "#|" not in page


def test_solutions_and_set_up_are_folded(page):
    solution = re.search(r"<details.*?</details>", page[page.index("Solution") - 200 :], flags=re.S)
    assert "42" in solution[0] and "hidden" in solution[0]
    assert re.search(r"<summary[^>]*>Code</summary>", page)


def test_every_formula_of_the_library_can_be_drawn():
    missing = []
    for path in notebook_paths():
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                prose = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.S)
                for block, line in re.findall(
                    r"\$\$(.+?)\$\$|(?<![\\$])\$([^$]+?)\$", prose, flags=re.S
                ):
                    drawn = mathml(block or line)
                    left = re.findall(r"<code>|<m[a-z]+>\\\\[a-zA-Z]+", drawn)
                    missing += [(path.name, block or line)] if left else []
    assert not missing, missing
