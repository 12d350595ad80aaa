"""Many notebooks: what one does is its own result; workers that die, and interruptions."""

import os
import signal
from pathlib import Path

import nbformat
import pytest
from runner_helpers import WAIT, claim, is_gone, outputs, pid_of, wait_until

from shuffle_nb.runner import many, page
from shuffle_nb.runner.catalogue import find
from shuffle_nb.runner.many import run_notebook, run_notebooks

pytestmark = pytest.mark.timeout(300)

ENDS = {
    "exit0": ("import sys; sys.exit(0)", "failed", "SystemExit: 0"),
    "exit3": ("raise SystemExit(3)", "failed", "SystemExit: 3"),
    "dies": ("import os; os._exit(0)", "died", "Kernel died"),
    "raises": ("x = 1\nraise ValueError('a\\n\\x1b[31mb')", "failed", "ValueError: a b"),
    "garbled": (
        "from IPython.display import display\n"
        "display({'application/vnd.shuffle-nb.claims+json': {'claims': [1]}}, raw=True)",
        "failed",
        "its stored claims cannot be read: ",
    ),
    "surrogate": ("display({'text/plain': '\\ud800'}, raw=True)", "failed", "UnicodeEncodeError"),
}


def test_the_trouble_of_one_is_its_result_and_the_others_run(write, shuffle_nb, tmp_path):
    paths = [write(code, "print('last')", name=name) for name, (code, *_) in ENDS.items()]
    broken = tmp_path / "broken.ipynb"
    broken.write_text('{"cells": 3}')
    odd = write(parameters="a = = 1", name="odd")
    dash = write("print('dash')", name="-dash")
    bare = tmp_path / "bare.ipynb"
    bare.write_text('{"cells": [{"cell_type": "code", "source": "print(1)"}]}')
    done = shuffle_nb("run", *paths, broken, odd, dash, bare)
    assert done.returncode == 1 and done.stderr == ""
    for name, (_, status, error) in ENDS.items():
        assert f"{name}: {error}" in done.stdout, status
    assert "broken: " in done.stdout and "broken.ipynb is not a notebook" in done.stdout
    assert "odd: the cell tagged 'parameters' is not plain Python" in done.stdout
    assert "-dash: no claims" in done.stdout and "bare: no claims" in done.stdout
    assert "raise ValueError('a" in done.stdout and "\x1b" not in done.stdout
    assert outputs(tmp_path / "runs" / "-dash.ipynb") == "dash\n"
    kept = {path.stem for path in (tmp_path / "runs").iterdir()}
    assert kept == {*ENDS, "-dash", "bare"}


def test_a_full_disk_before_the_first_cell_leaves_nothing(write, tmp_path, monkeypatch):
    write_text = Path.write_text

    def full(path, *arguments, **options):
        if path.parent.name == "runs":
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    results = run_notebooks([(find(str(write())), {})] * 2, out=tmp_path / "runs")
    assert [result.error for result in results] == ["No space left on device"] * 2
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_page_that_cannot_be_written_is_a_result(write, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "own_exporter", lambda: 1 / 0)
    result = run_notebook(find(str(write())), out=tmp_path / "runs", html=True)
    assert result.error == "no page: ZeroDivisionError: division by zero"
    assert not result.ok and result.notebook.exists()


def test_a_notebook_imports_what_lies_beside_it(write, tmp_path, monkeypatch):
    desk = tmp_path / "my desk's"
    path = write("import helper; print(helper.answer)", "print('sys' in globals())", folder=desk)
    (desk / "helper.py").write_text("answer = 42")
    (desk / "json.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    runs = [(find(str(path)), {})] * 2
    for result in run_notebooks(runs, out=tmp_path / "runs", jobs=2):
        assert result.ok and outputs(result.notebook) == "42\nFalse\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_leaves_the_partial_notebook_and_no_kernel(write, start, tmp_path, number):
    running = start("run", write("print('before')", WAIT), write(name="next"))
    pid = pid_of(tmp_path)
    os.killpg(running.pid, number)  # as a terminal does
    out, err = running.communicate(timeout=90)
    assert running.returncode == 130
    assert err == "shuffle-nb: interrupted: small in cell 4: import os, pathlib, time\n"
    assert "partial notebook: runs/small.ipynb" in out
    assert "before" in outputs(tmp_path / "runs" / "small.ipynb")
    assert not (tmp_path / "runs" / "next.ipynb").exists()
    wait_until(lambda: is_gone(pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_among_many_keeps_what_each_had_done(write, start, tmp_path, number):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    slow = WAIT.replace('"pid"', 'f"{name}.pid"')
    names = ("left", "right")
    paths = [write(f"name = {name!r}", "print('before')", slow, name=name) for name in names]
    running = start("run", write("print('done')"), *paths, "--jobs", "2", TMPDIR=str(scratch))
    files = [tmp_path / f"{name}.pid" for name in names]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files))
    # A terminal tells all its processes, a job manager the first.
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
    err = running.communicate(timeout=90)[1]
    assert running.returncode == 130, err
    assert err.startswith("shuffle-nb: interrupted: ") and err.count("\n") == 1
    assert err.count("in cell 5: import os, pathlib, time") == 2
    for name in names:
        assert outputs(tmp_path / "runs" / f"{name}.ipynb") == "before\n"
    assert outputs(tmp_path / "runs" / "small.ipynb") == "done\n"
    wait_until(lambda: all(is_gone(int(file.read_text())) for file in files))
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_while_the_cluster_starts_is_quiet(write, start, tmp_path, number):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    paths = [write(name="a"), write(name="b")]
    running = start("run", *paths, "--jobs", "2", TMPDIR=str(scratch))
    wait_until(lambda: list(scratch.glob("shuffle-nb-*")))  # made just before the workers
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
    out, err = running.communicate(timeout=90)
    assert (running.returncode, out) == (130, "")
    assert err == "shuffle-nb: interrupted: nothing was running\n"
    assert list(scratch.iterdir()) == []


# A cell's parent process is the worker.
KILL_WORKER = """import os, signal, time
time.sleep(0.2)  # let the worker tell that we began
os.kill(os.getppid(), signal.SIGKILL)
time.sleep(9)"""


def test_many_go_on_when_one_fails_and_one_kills_its_workers(write, tmp_path):
    paths = {
        "good": write(claim(), name="good"),
        "fails": write("1 / 0", name="fails"),
        "always": write("print('before')", KILL_WORKER, name="always"),
    }
    results = run_notebooks(
        [(find(str(path)), {}) for path in paths.values()], out=tmp_path / "runs", jobs=2
    )
    outcome = {result.name: result for result in results}
    assert {name: result.status for name, result in outcome.items()} == {
        "good": "ok",
        "fails": "failed",
        "always": "died",
    }
    always = outcome["always"]
    assert (always.cell, always.error) == (4, "its worker died, twice")
    assert outputs(always.notebook) == "before\n"
    assert all(result.notebook.is_file() for result in results)


def test_results_of_the_same_notebook_get_names_of_their_own(write, tmp_path):
    paper = find(str(write("print(steps)")))
    results = run_notebooks([(paper, {"steps": 1}), (paper, {"steps": 2})], out=tmp_path / "runs")
    assert [result.name for result in results] == ["small", "small (2)"]
    assert [outputs(result.notebook).strip() for result in results] == ["1", "2"]
    assert nbformat.read(results[1].notebook, as_version=4)
    assert Path(results[1].notebook).name == "small-2.ipynb"


class Workers:
    """Answers as a connected client does, with what two workers would say."""

    def __init__(self, answer):
        self.answer = answer

    def run(self, function):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "tcp://x has no workers; start one with: dask worker tcp://x"),
        ({"tcp://a": "0" * 64}, "tcp://a runs other code of shuffle_nb .* than we do"),
        (
            Exception("Traceback\n  File\nModuleNotFoundError: No module named 'shuffle_nb'"),
            "the workers of tcp://x cannot run shuffle_nb .*: ModuleNotFoundError: No module named",
        ),
    ],
)
def test_workers_that_could_not_run_our_code_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        many.check_workers(Workers(answer), "tcp://x")


def test_workers_with_our_own_code_are_taken():
    many.check_workers(Workers({"tcp://a": many.package_digest()}), "tcp://x")
