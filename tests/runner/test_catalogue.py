"""Finding notebooks and reading their title cells."""

import json
import shutil
import subprocess
import sys

import nbformat
import pytest

from shuffle_nb.runner import catalogue
from shuffle_nb.runner.catalogue import find, papers, read_paper, stored_claims


@pytest.fixture
def shelf(write, tmp_path):
    """A small library: two families, a set-up, a foundation, a home page."""
    root = tmp_path / "nbs"
    write(name="01_fold", folder=root / "shuffles")
    write(name="02_sum", folder=root / "shuffles")
    write(name="01_fold", folder=root / "mobile")
    write(name="00_setup", folder=root / "mobile")
    write(name="index", folder=root / "mobile")
    write(name="01_claims", folder=root / "foundations")
    write(name="index", folder=root)
    write(name="draft", folder=root / ".ipynb_checkpoints")
    return root


def test_only_numbered_notebooks_of_families_are_papers(shelf):
    names = [f"{paper.family}/{paper.slug}" for paper in papers(root=shelf)]
    assert names == ["mobile/fold", "shuffles/fold", "shuffles/sum"]
    assert [paper.slug for paper in papers("mobile", shelf)] == ["fold"]


def test_title_cell_becomes_a_paper(shelf):
    paper = find("sum", shelf)
    assert (paper.title, paper.arxiv, paper.year, paper.minutes) == (
        "02_sum",
        "2401.00010",
        2024,
        3,
    )
    assert paper.categories == ("example", "shuffle")
    assert paper.code == ""
    with pytest.raises(AttributeError):
        paper.year = 1


@pytest.mark.parametrize("name", ["shuffles/fold", "shuffles/01_fold"])
def test_a_family_tells_namesakes_apart(shelf, name):
    assert find(name, shelf).path == shelf / "shuffles" / "01_fold.ipynb"


def test_an_ambiguous_name_is_refused_with_the_choices(shelf):
    with pytest.raises(ValueError, match="write mobile/fold or shuffles/fold"):
        find("fold", shelf)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("foundations/01_claims", "foundations/01_claims.ipynb"),
        ("claims", "foundations/01_claims.ipynb"),
        ("setup", "mobile/00_setup.ipynb"),
        ("index", "index.ipynb"),
        ("mobile/index", "mobile/index.ipynb"),
    ],
)
def test_other_notebooks_are_found_too(shelf, name, path):
    assert find(name, shelf).path == shelf / path


def test_unknown_name_gives_the_nearest(shelf):
    with pytest.raises(ValueError, match=r"^no notebook 'summ'; did you mean 'sum'\?$"):
        find("summ", shelf)
    with pytest.raises(ValueError, match="no family 'x'; there are: mobile, shuffles"):
        papers("x", shelf)


def test_a_path_is_found_even_without_a_title_cell(tmp_path):
    path = tmp_path / "mine.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), path)
    assert find(str(path)).slug == "mine"
    with pytest.raises(ValueError, match="no file"):
        find(str(tmp_path / "other.ipynb"))


@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("# T\n\n> s\n\n- authors: a\n- year: 2020\n", "no categories, minutes"),
        (
            "# T\n\n> s\n\n- authors: a\n- year: 20x0\n- categories: [a]\n- minutes: 1",
            "'year' .* must be a whole number, got '20x0'",
        ),
        ("no facts at all", "no title, summary"),
    ],
)
def test_malformed_title_cell_names_file_and_fault(tmp_path, title, message):
    path = tmp_path / "01_bad.ipynb"
    cells = [nbformat.v4.new_markdown_cell(title)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(ValueError, match=rf"01_bad\.ipynb.*{message}"):
        read_paper(path)


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    path = tmp_path / "broken.ipynb"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.ipynb is not a notebook"):
        read_paper(path)


@pytest.mark.parametrize("ours", [float("nan"), "nan", None])
def test_nan_never_holds(ours):
    record = dict(text="t", ours=ours, relation="<", bound=1, holds=True)
    bundle = {catalogue.CLAIMS_MIME: {"claims": [record]}}
    (claim,) = stored_claims([{"outputs": [{"data": bundle}]}])
    assert claim["holds"] is False


def test_a_wheels_notebooks_come_before_a_checkouts(tmp_path, monkeypatch, write):
    package = tmp_path / "site" / "shuffle_nb"
    write(name="index", folder=tmp_path / "site" / "nbs")
    package.mkdir()
    monkeypatch.setattr(catalogue.shuffle_nb, "__file__", str(package / "__init__.py"))
    assert catalogue.notebook_root() == tmp_path / "site" / "nbs"
    write(name="index", folder=package / "nbs")
    assert catalogue.notebook_root() == package / "nbs"
    shutil.rmtree(package / "nbs")
    shutil.rmtree(tmp_path / "site" / "nbs")
    with pytest.raises(ValueError, match="no notebooks found"):
        catalogue.notebook_root()


def test_the_command_line_loads_nothing_heavy():
    heavy = {"torch", "papermill", "distributed", "dask", "nbconvert", "nbformat", "matplotlib"}
    code = "import sys, json, shuffle_nb.runner.cli; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(json.loads(done.stdout))
