"""The command: its tables, its exit codes, its one line for what is wrong; lab and refresh."""

import sys

import nbformat
import pytest
from runner_helpers import claim

import shuffle_nb as package
from shuffle_nb.runner import cli
from shuffle_nb.runner.catalogue import find, notebook_root, papers, read_cells
from shuffle_nb.runner.cli import copy_notebooks, ledger, refresh_notebook, strip

pytestmark = pytest.mark.timeout(300)


def text_of(table, capsys):
    cli.console().print(table)
    return capsys.readouterr().out


# The real catalogue


def test_list_shows_every_paper(shuffle_nb):
    done = shuffle_nb("list")
    assert done.returncode == 0 and done.stderr == ""
    assert all(paper.slug in done.stdout for paper in papers())
    family = papers()[0].family
    assert shuffle_nb("list", family).stdout.count(f"│ {family} ") == len(papers(family))


def test_claims_reads_every_notebook_and_runs_none(shuffle_nb, tmp_path):
    done = shuffle_nb("claims")
    assert done.returncode == 0 and done.stderr == ""
    assert all(paper.slug in done.stdout for paper in papers())
    assert f"of {len(papers())} notebooks not run" in done.stdout
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
        (["refresh"], "name the notebooks to run"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(write, shuffle_nb, tmp_path, arguments, message):
    write()
    done = shuffle_nb(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"shuffle-nb: {message}")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["small.ipynb"]


def test_a_missing_device_is_one_line_and_exit_2(write, shuffle_nb, tmp_path):
    path = write(parameters="device = 'auto'")
    done = shuffle_nb("run", path, "--device", "cuda:99")
    assert done.returncode == 2
    message = "device 'cuda:99' is not available on this machine; use 'auto' or 'cpu'"
    assert done.stderr == f"shuffle-nb: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small.ipynb"]


# Claims


def test_what_was_not_run_does_not_hold(write, capsys):
    record = dict(text="few", ours=float("nan"), relation="<", bound=1, holds=True, paper="0.5")
    bundle = {"application/vnd.shuffle-nb.claims+json": {"claims": [record]}}
    path = write(claim(), name="01_measured")
    node = nbformat.read(path, as_version=4)
    node.cells[-1].outputs = [nbformat.v4.new_output("display_data", bundle)]
    nbformat.write(node, path)
    shelf = [find(str(path)), find(str(write(claim(), name="02_fresh")))]
    table, summary = ledger(shelf)
    lines = text_of(table, capsys).splitlines()
    assert any("measured" in line and "NO" in line and "nan" in line for line in lines)
    assert any("fresh" in line and "not run" in line for line in lines)
    assert summary == "0 of 1 stored claims hold; 1 of 2 notebooks not run"


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


def test_refresh_stores_outputs_and_leaves_no_trace(write, shuffle_nb, tmp_path):
    path = write("print('seen')", claim())
    node = nbformat.read(path, as_version=4)
    injected = nbformat.v4.new_code_cell("steps = 9", metadata={"tags": ["injected-parameters"]})
    node.cells.insert(2, injected)
    node.metadata["papermill"] = {"version": "0"}
    nbformat.write(node, path)
    done = shuffle_nb("refresh", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "small: 1 of 1 claims hold" in done.stdout
    cells = read_cells(path)
    assert [cell["metadata"] for cell in cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert cells[2]["outputs"][0]["text"] == ["seen\n"]
    assert "papermill" not in path.read_text()
    assert list((tmp_path / "runs").iterdir()) == []


def test_refresh_changes_nothing_when_a_cell_fails(write, shuffle_nb, tmp_path):
    path = write("1 / 0")
    before = path.read_bytes()
    done = shuffle_nb("refresh", path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stdout and "runs/small.ipynb" in done.stdout
    assert path.read_bytes() == before


def test_refresh_leaves_an_installed_package_alone(write, tmp_path):
    folder = tmp_path / "site-packages" / "shuffle_nb" / "nbs"
    paper = find(str(write(folder=folder)))
    with pytest.raises(ValueError, match="part of an installed package; refresh needs a checkout"):
        refresh_notebook(paper, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_strip_removes_what_papermill_puts_in():
    notebook = {
        "metadata": {"papermill": {}, "kernelspec": {}},
        "cells": [
            {"metadata": {"tags": ["papermill-error-cell-tag"]}},
            {"metadata": {"tags": ["parameters"], "papermill": {}, "execution": {}}},
        ],
    }
    assert strip(notebook) == {
        "metadata": {"kernelspec": {}},
        "cells": [{"metadata": {"tags": ["parameters"]}}],
    }
