"""Finding notebooks and reading their title cells."""

import json
import shutil
import subprocess
import sys

import nbformat
import pytest

from shuffle_nb.foundations.claims import CLAIMS_MIME, Claim, claim_record
from shuffle_nb.runner import catalogue
from shuffle_nb.runner.catalogue import (
    Unreadable,
    find,
    papers,
    read_cells,
    read_paper,
    reading_minutes,
    stored_claims,
)


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


BROKEN = [
    *["", "{}", "[1, 2]", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"source": "x"}]}'],
    *['{"cells": [{"cell_type": "code"}]}', '{"cells": [{"cell_type": "code", "source": 1}]}'],
    "[" * 100_000,
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    path = tmp_path / "broken.ipynb"
    path.write_text(text)
    with pytest.raises(Unreadable, match=r"broken\.ipynb is not a notebook"):
        read_paper(path)
    assert find(str(path)).slug == "broken"  # it may be asked for; its run will say so


def test_a_cell_may_lack_metadata(tmp_path):
    path = tmp_path / "old.ipynb"
    path.write_text('{"cells": [{"cell_type": "code", "source": ["a = 1\\n", "a"]}]}')
    (cell,) = read_cells(path)
    assert (cell["source"], cell["metadata"], cell["outputs"]) == ("a = 1\na", {}, [])


def test_names_that_no_file_can_have_are_refused(tmp_path):
    loop = tmp_path / "loop.ipynb"
    loop.symlink_to(loop)
    for name in ("a" * 300 + ".ipynb", "a" * 5000 + ".ipynb", "nul\0.ipynb", str(loop)):
        with pytest.raises(ValueError, match="no file"):
            find(name)
    with pytest.raises(ValueError, match="no notebook"):
        find("a" * 5000)


def test_a_title_brings_no_escape_sequences(tmp_path):
    path = tmp_path / "own.ipynb"
    cells = [nbformat.v4.new_markdown_cell("# A \x1b[31mred\x1b[0m title")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert find(str(path)).title == "A red title"


def record(**changes):
    return claim_record(Claim("few", "It is few", "count", 0.5, "<", 1, paper="0.5")) | changes


def stored(*claims):
    return [{"outputs": [{"data": {CLAIMS_MIME: {"claims": list(claims), "date": "2026-01-02"}}}]}]


def test_a_stored_claim_cannot_promise_more_than_its_numbers():
    (claim,) = stored_claims(stored(record()))
    assert (claim["verdict"], claim["ours"], claim["date"]) == ("holds", [0.5], "2026-01-02")
    for ours in ([2.0], ["nan"]):
        (claim,) = stored_claims(stored(record(ours=ours, holds=True, verdict="holds")))
        assert (claim["holds"], claim["verdict"]) == (False, "fails")
    (claim,) = stored_claims(stored(record(control={"name": "off", "values": [0.1]})))
    assert claim["verdict"] == "too weak"


def test_a_stored_claim_brings_no_escape_sequences():
    (claim,) = stored_claims(
        stored(record(text="all \x1b[2J\x1b]0;title\x07well", unit="s\x1b[1m"))
    )
    assert (claim["text"], claim["unit"]) == ("all well", "s")


@pytest.mark.parametrize(
    "bundle",
    [
        {},
        {"claims": 3},
        {"claims": ["text"]},
        {"claims": [{}]},
        {"claims": [record(ours=[None])]},
        {"claims": [record(ours="0.5")]},
        {"claims": [record(bound="inf")]},
        {"claims": [record(kind="effect")]},
        {"claims": [record(control="off")]},
        "text",
        None,
    ],
)
def test_malformed_claims_are_one_kind_of_error(bundle):
    with pytest.raises(Unreadable, match="its stored claims cannot be read: "):
        stored_claims([{"outputs": [{"data": {CLAIMS_MIME: bundle}}]}])


def test_minutes_follow_from_words_and_lines():
    prose = {"cell_type": "markdown", "source": "word " * 500}
    code = {"cell_type": "code", "source": "#| exports\n\n" + "x = 1\n" * 60}
    raw = {"cell_type": "raw", "source": "not counted " * 1000}
    assert reading_minutes([prose, code, raw]) == 4  # 2.5 + 2 = 4.5, to the even side
    assert reading_minutes([]) == 1


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
