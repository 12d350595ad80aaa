"""The command: its tables, its exit codes, its one line for what is wrong; lab and refresh."""

import json
import signal
import subprocess
import sys

import nbformat
import pytest
from runner_helpers import MIME, claim

import shuffle_nb as package
from shuffle_nb.foundations.claims import Claim, Control, claim_record
from shuffle_nb.runner import cli, execute
from shuffle_nb.runner.catalogue import find, notebook_root, papers, read_cells, reading_minutes
from shuffle_nb.runner.cli import copy_notebooks, refresh_notebook, tidy, with_minutes

pytestmark = pytest.mark.timeout(300)


# The real catalogue


def test_list_shows_every_paper(shuffle_nb):
    done = shuffle_nb("list")
    assert done.returncode == 0 and done.stderr == ""
    assert all(paper.slug in done.stdout for paper in papers())
    for family in {paper.family for paper in papers()}:  # names stay whole on a narrow screen
        lines = shuffle_nb("list", family).stdout.splitlines()
        assert sum(f"│ {family} " in line for line in lines) == len(papers(family))


def test_list_verbose_says_who_wrote_a_paper_and_how_it_stands(shuffle_nb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    done = shuffle_nb("list", "--verbose")
    assert done.returncode == 0 and done.stderr == ""
    (paper,) = [paper for paper in papers() if paper.slug == "coordinate_attention"]
    (line,) = [line for line in done.stdout.splitlines() if f"│ {paper.slug} " in line]
    for fact in (paper.authors, str(paper.year), paper.arxiv, paper.venue, f"│ {paper.minutes} "):
        assert fact in line
    assert cli.agreement_of(paper) in line
    assert cli.verbose_row(paper)[-2] in line


def test_claims_reads_every_notebook_and_runs_none(shuffle_nb, tmp_path):
    done = shuffle_nb("claims")
    assert done.returncode == 0 and done.stderr == ""
    assert all(paper.slug in done.stdout for paper in papers())
    assert f"of {len(papers())} notebooks without claims" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(shuffle_nb):
    for arguments in [[], ["--help"]]:
        done = shuffle_nb(*arguments)
        assert done.returncode == 0
        assert "shuffle-nb sweep token_shuffle -p lr=1e-3,1e-2 -p seeds=[0],[1]" in done.stdout
    assert "Exit code 0" in shuffle_nb("run", "-h").stdout
    assert shuffle_nb("--version").stdout == f"shuffle-nb {package.__version__}\n"


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name the notebooks to run, or give --all; see: shuffle-nb list"),
        (["run", "small.ipynb", "--all"], "name the notebooks to run, or give --all; "),
        (["run", "other.ipynb"], "no file other.ipynb"),
        (["run", "foundations/catalog"], "no notebook 'foundations/catalog'; did you mean 'catal"),
        (["list", "no_family"], "no family 'no_family'; there are: "),
        (["claims", "zzzzzzz"], "no notebook 'zzzzzzz'; see: shuffle-nb list"),
        (["run", "small.ipynb", "-p", "stesp=1"], "small has no parameter 'stesp'; did you mean"),
        (["run", "small.ipynb", "-p", "steps=x"], "parameter 'steps' of small expects int"),
        (["run", "small.ipynb", "-p", "steps"], "a parameter is given as name=value, got 'steps'"),
        (["run", "small.ipynb", "--scale", "full"], "small has no parameter 'scale'"),
        (["run", "small.ipynb", "--jobs", "0"], "jobs expects a number from 1 up, got 0"),
        (["run", "small.ipynb", "--out", "small.ipynb"], "cannot write into small.ipynb: "),
        (["run", "small.ipynb", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        (["sweep", "small.ipynb"], "a sweep needs a parameter to sweep"),
        (["sweep", "small.ipynb", "-p", "steps=1", "--jobs", "0"], "jobs expects a number"),
        (["sweep", "small.ipynb", "-p", "steps=1,x"], "parameter 'steps' of small expects int"),
        (["lab", "small.ipynb"], "lab opens a notebook of the library"),
        (["lab", "index", "cli"], "lab opens one notebook, got index, cli"),
        (["run", "small.ipynb", "--device", ""], "Invalid value for '--device': it must not be"),
        (["run", "small.ipynb", "--scale="], "Invalid value for '--scale': it must not be"),
        (["run", "small.ipynb", "--scheduler", " "], "Invalid value for '--scheduler': it must"),
        (["run", "small.ipynb", "--out", ""], "Invalid value for '--out': it must not be empty"),
        (["sweep", "small.ipynb", "-p", "steps=1", "--out="], "Invalid value for '--out': it"),
        (["lab", "--folder", ""], "Invalid value for '--folder': it must not be empty"),
        (["run", ""], "no notebook ''"),
        (["list", ""], "no family ''; there are: "),
        (["run", "a" * 300 + ".ipynb"], "no file aaa"),
        (["run", "small.ipynb", "--out", "a" * 300], "cannot write into aaa"),
        (["run", "small.ipynb", "-p", "lr=1e999"], "parameter 'lr' of small expects finite numb"),
        (["run", "\x1b[31mred"], "no notebook '"),
        (["claims", "small.ipynb", "--jsn"], "No such option: --jsn"),
        (["refresh"], "name the notebooks to run"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(write, shuffle_nb, tmp_path, arguments, message):
    write()
    done = shuffle_nb(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"shuffle-nb: {message}")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert "\x1b" not in done.stderr and len(done.stderr) < 700
    assert [path.name for path in tmp_path.iterdir()] == ["small.ipynb"]


def test_a_missing_device_is_one_line_and_exit_2(write, shuffle_nb, tmp_path):
    path = write(parameters="device = 'auto'")
    done = shuffle_nb("run", path, "--device", "cuda:99")
    assert done.returncode == 2
    message = "device 'cuda:99' is not available on this machine; use 'auto' or 'cpu'"
    assert done.stderr == f"shuffle-nb: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small.ipynb"]


# Claims


def store_claims(path, *claims):
    node = nbformat.read(path, as_version=4)
    bundle = {MIME: {"claims": list(claims), "date": "2026-01-02"}}
    node.cells[-1].outputs = [nbformat.v4.new_output("display_data", bundle)]
    nbformat.write(node, path)
    return path


@pytest.fixture
def shelf(write):
    """Claims that hold, that do not, and notebooks that have none."""
    off = Control("off", [2.0, 3.0, 4.0])
    few = Claim("few", "It is few ≥ µ", "effect", [0.1, 0.2, 0.3], "<", 1, control=off, unit="ms")
    late = Claim("late", "It is late", "cost", [0.5] * 3, ">", 1, expected=False)
    nan = Claim("nan", "It is nothing", "count", float("nan"), "<", 1, paper="0.5")
    records = [claim_record(claim) for claim in (few, late, nan)]
    records[0]["text"] += "\x1b[2J"
    broken = write(claim(), name="04_broken")
    broken.write_text('{"cells": 3}')
    return [
        store_claims(write(claim(), name="01_measured"), *records),
        write(claim(), name="02_fresh"),
        store_claims(write(claim(), name="03_odd"), "all is well"),
        broken,
    ]


def test_the_ledger_counts_verdicts_and_absence_is_no_success(shuffle_nb, shelf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    done = shuffle_nb("claims", *shelf)
    lines = done.stdout.splitlines()
    for slug, words in {
        "measured": ["It is few ≥ µ", "off: ", "holds"],
        "fresh": ["not run"],
        "odd": ["its stored claims cannot be read"],
        "broken": ["is not a notebook"],
    }.items():
        found = " ".join(line for line in lines if f"│ {slug} " in line)
        assert all(word in found for word in words), (slug, found)
    summary = "1 of 3 claims hold, 1 not shown here; 3 of 4 notebooks without claims"
    assert lines[-1] == summary
    assert "\x1b" not in done.stdout


def test_claims_as_records_for_programs(shuffle_nb, shelf):
    found = json.loads(shuffle_nb("claims", "--json", *shelf).stdout)
    assert [claim["name"] for claim in found["claims"]] == [
        *["measured/few", "measured/late", "measured/nan"]
    ]
    first = found["claims"][0]
    assert (first["ours"], first["verdict"], first["date"]) == (
        [0.1, 0.2, 0.3],
        "holds",
        "2026-01-02",
    )
    assert first["control"] == {"name": "off", "values": [2.0, 3.0, 4.0]}
    assert found["without"]["fresh"] == "not run" and set(found["without"]) == {
        "fresh",
        "odd",
        "broken",
    }


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_no_console_is_too_narrow_for_a_letter(start, shelf, encoding):
    out, err = start("claims", *shelf, PYTHONIOENCODING=encoding, PYTHONUTF8="0").communicate()
    assert err == "" and "1 of 3 claims hold" in out


def test_python_m_is_the_command(tmp_path):
    command = [sys.executable, "-m", "shuffle_nb", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.returncode) == (f"shuffle-nb {package.__version__}\n", 0)


def test_signals_that_somebody_ignores_stay_ignored():
    before = signal.getsignal(signal.SIGTERM)
    held = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.signals_as_ctrl_c():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGHUP, held)


# lab


@pytest.fixture
def library(tmp_path):
    """Two notebooks of a library, to be copied; their content does not matter here."""
    for name in ("a", "family/01_b"):
        path = tmp_path / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}, first edition")
    return tmp_path / "nbs"


def test_lab_copies_and_updates_what_the_reader_left_alone(library, tmp_path):
    desk = tmp_path / "desk"
    assert copy_notebooks(library, desk) == []
    assert (desk / "family" / "01_b.ipynb").read_text() == "family/01_b, first edition"
    (library / "a.ipynb").write_text("a, second edition")
    assert copy_notebooks(library, desk) == []
    assert (desk / "a.ipynb").read_text() == "a, second edition"


def test_lab_keeps_what_the_reader_changed(library, tmp_path):
    desk = tmp_path / "desk"
    copy_notebooks(library, desk)
    (desk / "a.ipynb").write_text("my notes")
    assert copy_notebooks(library, desk) == []  # nothing new to offer
    (library / "a.ipynb").write_text("a, second edition")
    assert copy_notebooks(library, desk) == [desk / "a.new.ipynb"]
    assert (desk / "a.ipynb").read_text() == "my notes"
    assert (desk / "a.new.ipynb").read_text() == "a, second edition"
    (desk / "a.new.ipynb").unlink()
    assert copy_notebooks(library, desk) == []  # offered once, declined once


def test_lab_keeps_a_file_that_was_there_before(library, tmp_path):
    desk = tmp_path / "desk"
    desk.mkdir()
    (desk / "a.ipynb").write_text("from somewhere else")
    (desk / "a.new.ipynb").write_text("this too")
    assert copy_notebooks(library, desk) == []
    assert (desk / "a.ipynb").read_text() == "from somewhere else"
    assert (desk / "a.new.ipynb").read_text() == "this too"


@pytest.mark.parametrize("text", ["{", "[]", "3", "\xff"])
def test_lab_lives_with_a_broken_memory(library, tmp_path, capsys, text):
    desk = tmp_path / "desk"
    copy_notebooks(library, desk)
    (desk / "a.ipynb").write_text("my notes")
    (desk / cli.MANIFEST).write_text(text, encoding="latin-1")
    (library / "family" / "01_b.ipynb").write_text("second edition")
    assert [path.name for path in copy_notebooks(library, desk)] == [
        "a.new.ipynb",
        "01_b.new.ipynb",
    ]
    assert f"{cli.MANIFEST} cannot be read" in capsys.readouterr().out.replace("\n", "")
    assert (desk / "a.ipynb").read_text() == "my notes"
    assert copy_notebooks(library, desk) == []


def test_lab_without_launch_only_copies(shuffle_nb, tmp_path):
    done = shuffle_nb("lab", "--no-launch", "--folder", "desk")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "desk").rglob("*.ipynb")}
    assert names >= {paper.path.name for paper in papers()}
    changed = next((tmp_path / "desk").rglob("01_*.ipynb"))
    changed.write_text("mine")
    assert shuffle_nb("lab", "--no-launch", "--folder", "desk").returncode == 0
    assert changed.read_text() == "mine"


def test_lab_opens_the_notebook_with_its_usual_token(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(cli.os, "execve", lambda *arguments: called.append(arguments))
    paper = papers()[0]
    cli.lab([f"{paper.family}/{paper.slug}", "--no-browser"], folder=tmp_path / "desk")
    ((program, command, environment),) = called
    page = paper.path.relative_to(notebook_root()).as_posix()
    assert program == sys.executable and command[1:3] == ["-m", "jupyterlab"]
    assert f"--LabApp.default_url=/lab/tree/{page}" in command
    assert f"--ServerApp.root_dir={tmp_path / 'desk'}" in command
    assert command[-1] == "--no-browser"
    assert not any("token" in part or "password" in part for part in command)
    assert environment["JUPYTER_PREFER_ENV_PATH"] == "1"


# refresh


CONTROLS = """from IPython.display import display
view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Slider()"}
display(view, raw=True)
display(view | {"image/png": "aGk="}, raw=True)"""


def test_refresh_stores_outputs_and_leaves_no_trace(write, shuffle_nb, tmp_path):
    path = write("print('seen')", claim(), CONTROLS)
    node = nbformat.read(path, as_version=4)
    injected = nbformat.v4.new_code_cell("steps = 9", metadata={"tags": ["injected-parameters"]})
    node.cells.insert(2, injected)
    node.metadata["papermill"] = {"version": "0"}
    hidden = {"jupyter": {"source_hidden": True}, "tags": ["solution"]}
    node.cells[3].metadata.update(hidden)
    nbformat.write(node, path)
    done = shuffle_nb("refresh", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "small: 1 of 1 claims hold" in done.stdout
    cells = read_cells(path)
    assert [cell["metadata"] for cell in cells] == [{}, {"tags": ["parameters"]}, hidden, {}, {}]
    assert cells[2]["outputs"][0]["text"] == ["seen\n"]
    assert [list(output["data"]) for output in cells[4]["outputs"]] == [["image/png", "text/plain"]]
    assert (
        "papermill" not in path.read_text()
        and "widget" not in path.read_text().split(CONTROLS[-9:])[-1]
    )
    assert f"- minutes: {reading_minutes(cells)}\n" in cells[0]["source"]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("code", ["1 / 0", "import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_refresh_changes_nothing_unless_every_cell_ran(write, shuffle_nb, tmp_path, code):
    path = write(code, "print('last')")
    before = path.read_bytes()
    done = shuffle_nb("refresh", path)
    assert done.returncode == 1
    assert "in cell 3: " in done.stdout and "runs/small.ipynb" in done.stdout
    assert path.read_bytes() == before


def test_refresh_all_takes_every_notebook_that_has_code(shuffle_nb, monkeypatch):
    asked = []
    result = execute.RunResult("any", "ok")
    monkeypatch.setattr(cli, "refresh_notebook", lambda paper, out: asked.append(paper) or result)
    assert shuffle_nb("refresh", "--all").returncode == 0
    slugs = {paper.slug for paper in asked}
    assert {paper.slug for paper in papers()} | {"claims", "cli", "tiny_diffusion"} <= slugs
    assert shuffle_nb("refresh", "--all", "claims").returncode == 2


def test_refresh_leaves_an_installed_package_alone(write, tmp_path):
    folder = tmp_path / "site-packages" / "shuffle_nb" / "nbs"
    paper = find(str(write(folder=folder)))
    with pytest.raises(ValueError, match="part of an installed package; refresh needs a checkout"):
        refresh_notebook(paper, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_tidy_removes_what_a_run_puts_in():
    notebook = {
        "metadata": {"papermill": {}, "kernelspec": {}, "widgets": {}},
        "cells": [
            {"cell_type": "code", "source": "", "metadata": {"tags": ["papermill-error-cell-tag"]}},
            {
                "cell_type": "code",
                "source": "a = 1",
                "metadata": {"tags": ["parameters"], "papermill": {}, "execution": {}},
            },
        ],
    }
    assert tidy(notebook) == {
        "metadata": {"kernelspec": {}},
        "cells": [{"cell_type": "code", "source": "a = 1", "metadata": {"tags": ["parameters"]}}],
    }


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("# T\n\n- year: 1\n- minutes: 90\n- see: x", "# T\n\n- year: 1\n- minutes: 7\n- see: x"),
        ("# T\n\n> s\n\n- categories: [a]\n", "# T\n\n> s\n\n- categories: [a]\n- minutes: 7\n"),
        ("# T\n\n- categories: [a]", "# T\n\n- categories: [a]\n- minutes: 7"),
        ("# Home\n\nNo facts - minutes: none", "# Home\n\nNo facts - minutes: none"),
    ],
)
def test_minutes_are_stated_in_the_title_cell(title, expected):
    assert with_minutes(title, 7) == expected
