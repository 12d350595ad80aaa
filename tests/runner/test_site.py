"""What the site's pages get that the notebooks do not have."""

import pytest
import yaml
from execnb.nbio import mk_cell
from fastcore.basics import AttrDict

from shuffle_nb.runner.site import Page, bibtex, title_strip

FACTS = {
    "title": "A < B",
    "paper": "A is Smaller than B",
    "authors": "Ada Lovelace, Émilie du Châtelet",
    "arxiv": "2103.02907",
    "year": 2021,
    "venue": "CVPR 2021",
    "minutes": 20,
    "code": "https://github.com/some/code",
}
CLAIMS = {"data": {"application/vnd.shuffle-nb.claims+json": {}, "text/plain": "claims"}}
FIGURE = {"data": {"image/png": "", "text/plain": "figure"}}
WIDGET = {"data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "a slider"}}


def code(source, *outputs, directives=(), **metadata):
    cell = mk_cell(source, "code")
    cell.outputs, cell.metadata = list(outputs), metadata
    cell.directives_ = {name: [] for name in directives}
    return cell


def page_of(*cells, **facts):
    front = mk_cell(f"---\n{yaml.dump(facts)}---\n", "raw")
    notebook = AttrDict(
        cells=[front, *cells],
        frontmatter_=facts,
        path_="nbs/mobile/02_coordinate_attention.ipynb",
        metadata={"widgets": {}},
    )
    Page(notebook).begin()
    return notebook


def test_strip_names_the_paper_and_every_way_to_run_it():
    strip = title_strip(FACTS, "mobile/02_coordinate_attention.ipynb", "https://github.com/me/it")
    assert "A is Smaller than B" in strip and "Émilie du Châtelet" in strip
    for address in (
        "https://arxiv.org/abs/2103.02907",
        "https://github.com/some/code",
        "https://colab.research.google.com/github/me/it/blob/main/nbs/mobile/02_coordinate_attention.ipynb",
        "https://raw.githubusercontent.com/me/it/main/nbs/mobile/02_coordinate_attention.ipynb",
        "https://github.com/me/it/blob/main/shuffle_nb/mobile/coordinate_attention.py",
    ):
        assert f'href="{address}"' in strip
    assert strip.count("2021") == 1, "the venue has the year already"


def test_strip_leaves_out_what_is_not_known_and_escapes_the_rest():
    facts = {k: v for k, v in FACTS.items() if k not in ("code", "paper")}
    strip = title_strip(facts, "mobile/02_coordinate_attention.ipynb", "https://github.com/me/it")
    assert "the authors" not in strip and "A &lt; B" in strip
    place, facts = "mobile/02_coordinate_attention.ipynb", FACTS | {"code": "none published"}
    assert "none published" not in title_strip(facts, place, "https://github.com/me/it")


def test_only_papers_get_a_strip_and_a_bibliography():
    page = page_of(code("x = 1"), title="Claims")
    assert [cell.cell_type for cell in page.cells] == ["raw", "code"]
    page = page_of(code("x = 1"), **FACTS)
    assert "title-strip" in page.cells[1].source and "@article{" in page.cells[-1].source


def test_bibtex():
    entry = bibtex(FACTS)
    assert entry.startswith("@article{lovelace2021a,\n")
    assert "author = {Ada Lovelace and Émilie du Châtelet}" in entry
    assert "eprint = {2103.02907}" in entry


@pytest.mark.parametrize("output", [FIGURE, CLAIMS], ids=["figure", "claims"])
def test_drawing_and_claims_are_folded(output):
    (_, cell) = page_of(code("#| fig-alt: a line\ndraw()", output)).cells
    assert cell.source.startswith('#| code-fold: true\n#| code-summary: "Show the code"\n')


def test_what_teaches_stays_open_and_a_fold_is_not_doubled():
    shown, folded = page_of(
        code("def f(): ...", FIGURE, directives=["exports"]),
        code("#| code-fold: show\ndraw()", FIGURE),
    ).cells[1:]
    assert "code-fold" not in shown.source
    assert folded.source.count("code-fold") == 1


def test_what_jupyter_folds_is_folded():
    (_, cell) = page_of(code("plumbing()", jupyter={"source_hidden": True})).cells
    assert "#| code-fold: true" in cell.source


def test_a_solution_is_folded_with_its_output():
    solution = code("#| code-fold: true\n#| code-summary: Solution\nsolve()", tags=["solution"])
    solution.metadata = {"tags": ["solution"]}
    _, opening, cell, closing = page_of(solution).cells
    assert opening.source == '::: {.callout-note collapse="true" title="Solution"}'
    assert cell.source == "solve()" and closing.source == ":::"


def test_no_dead_controls():
    page = page_of(code("explore()", {"data": dict(WIDGET["data"])}))
    assert page.cells[1].outputs == [{"data": {"text/plain": "a slider"}}]
    assert "widgets" not in page.metadata


def test_a_function_is_shown_once():
    documented, plumbing = mk_cell("show_doc(f)"), mk_cell("show_doc(g)")
    documented.has_sd = plumbing.has_sd = True
    source = code("def f():\n    return 1", directives=["exports"])
    page = page_of(documented, source, plumbing)
    assert [cell.source for cell in page.cells[1:]] == [source.source, "show_doc(g)"]
