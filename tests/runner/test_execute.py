"""One notebook: its place, its kernel, its failures, floods, deaths."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from runner_helpers import WAIT, claim, outputs, pid_of

import shuffle_nb
from shuffle_nb.runner import execute as executing
from shuffle_nb.runner.catalogue import find
from shuffle_nb.runner.execute import (
    STORED,
    RunResult,
    check_folder,
    reserve,
    telling_line,
    write_atomically,
)
from shuffle_nb.runner.many import run_notebook

pytestmark = pytest.mark.timeout(300)


def test_many_at_once_never_get_the_same_file(tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(reserve(tmp_path / "runs", "a")))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 20
    assert {path.name for path in found} >= {"a.ipynb", "a-2.ipynb", "a-20.ipynb"}


def test_a_page_without_its_notebook_is_kept_too(tmp_path):
    (tmp_path / "a.html").write_text("mine")
    assert reserve(tmp_path, "a").name == "a-2.ipynb"


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    loop, dangling = tmp_path / "loop", tmp_path / "dangling"
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "gone")
    for path in (loop, dangling, tmp_path / ("a" * 300)):
        with pytest.raises(ValueError, match="cannot write into"):
            check_folder(path)


def test_a_long_name_still_finds_a_place(tmp_path):
    names = {reserve(tmp_path, "ä" * 250).name for _ in range(2)}
    assert len(names) == 2 and all(name.startswith("ä" * 90) for name in names)


def test_a_full_disk_leaves_no_stray_file(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_text("before")

    def full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("kept", "before")]


def test_a_file_in_the_way_is_bad_input(write, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match="cannot write into"):
        run_notebook(find(str(write())), out=tmp_path / "runs")


def test_a_run_measures_its_claims_with_the_given_parameters(write, tmp_path):
    path = write("print(steps, lr)", claim("steps"))
    before = path.read_bytes()
    result = run_notebook(find(str(path)), {"steps": 7, "lr": 1}, out=tmp_path / "{runs} here")
    assert result.ok and result.claims[0]["ours"] == [7]
    assert result.notebook == tmp_path / "{runs} here" / "small.ipynb"
    assert "7 1.0" in outputs(result.notebook)
    assert path.read_bytes() == before


def test_kernels_are_this_python_and_show_no_bars(write, tmp_path, monkeypatch):
    # Neither a kernel of the user's own called python3 nor a package in the folder gets in.
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["false"], "display_name": "", "language": ""}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "shuffle_nb").mkdir()
    (tmp_path / "shuffle_nb" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    path = write(
        "import sys, shuffle_nb; print(sys.executable); print(shuffle_nb.__file__)",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)): pass",
        "import os; print(os.environ['MPLBACKEND'])",
    )
    result = run_notebook(find(str(path)), out=tmp_path / "runs")
    assert result.ok, result.error
    expected = [sys.executable, shuffle_nb.__file__, "module://matplotlib_inline.backend_inline"]
    assert outputs(result.notebook).split() == expected


def test_a_second_run_numbers_its_output(write, shuffle_nb, tmp_path):
    path = write(claim("steps", "few steps"))
    for options in [["-p", "steps=4"], ["--html"]]:
        done = shuffle_nb("run", path, *options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no warnings of the libraries below
        assert "small: 1 of 1 claims hold" in done.stdout
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"small.ipynb", "small-2.ipynb", "small-2.html"}
    assert "runs/small-2.ipynb" in done.stdout and "runs/small-2.html" in done.stdout


def test_a_claim_that_does_not_hold_is_exit_1(write, shuffle_nb):
    done = shuffle_nb("run", write(claim("steps", "few steps")), "-p", "steps=40")
    assert done.returncode == 1
    assert "0 of 1 claims hold" in done.stdout
    assert re.search(r"few steps +│ 1 +│ 40 +│ < 10 +│ - +│ fails", done.stdout)


def test_claim_not_met_still_brings_the_claims(write, tmp_path):
    stop = "class ClaimNotMet(AssertionError): pass\nraise ClaimNotMet('1 of 1 claims do not hold')"
    path = write(claim("40"), stop, "print('never')")
    result = run_notebook(find(str(path)), out=tmp_path / "runs")
    assert (result.status, result.ok) == ("not held", False)
    assert result.error == "ClaimNotMet: 1 of 1 claims do not hold"
    assert [claim["holds"] for claim in result.claims] == [False]
    assert result.line.startswith("raise ClaimNotMet")
    assert outputs(result.notebook) == ""


def test_a_failing_cell_is_named_and_the_rest_is_there(write, shuffle_nb, tmp_path):
    failing = "#| exports\n\ndef ratio(x):\n    return 1 / x\n\n\nratio(1)\nanswer = ratio(0)"
    path = write("print('before')", failing, "print('after')")
    done = shuffle_nb("run", path, "-p", "steps=4")
    assert done.returncode == 1 and done.stderr == ""
    assert "small: ZeroDivisionError: division by zero in cell 4: return 1 / x (" in done.stdout
    assert "partial notebook: runs/small.ipynb" in done.stdout
    assert outputs(tmp_path / "runs" / "small.ipynb") == "before\n"


@pytest.mark.parametrize(
    ("traceback", "line"),
    [
        (["Cell In[7], line 2\n----> 2 b()", "Cell In[3], line 1, in b()"], "b()"),
        (["\x1b[36mCell \x1b[39mIn[7]\x1b[32m, line 3\x1b[39m", "SyntaxError"], "c = = 1"),
        (["Cell In[7], line 99"], ""),
        (["File somewhere.py:3, in f"], "a = 1"),
    ],
)
def test_the_failing_line_is_the_running_cells_own(traceback, line):
    outputs = [{"output_type": "error", "traceback": traceback}]
    cell = {"source": "a = 1\nb()\nc = = 1", "execution_count": 7, "outputs": outputs}
    assert telling_line(cell) == line


FLOOD = """import sys
for _ in range(3000):
    sys.stdout.write("0" * 2000 + "\\n")
    sys.stdout.flush()
"""


def test_a_flood_is_cut_and_the_claims_behind_it_are_kept(write, tmp_path):
    after = "print('after')\nimport sys; print('to stderr', file=sys.stderr)"
    result = run_notebook(find(str(write(FLOOD + claim(), after))), out=tmp_path / "runs")
    assert result.ok and len(result.claims) == 1
    cells = nbformat.read(result.notebook, as_version=4).cells
    (first, told) = [output.text for output in cells[2].outputs if "text" in output]
    assert len(first) == STORED and first.startswith("0" * 2000)
    assert told == "[1,003,000 characters of output are not stored: 5,000,000 a cell are]\n"
    assert [output.text for output in cells[3].outputs] == ["after\n", "to stderr\n"]


def test_a_full_disk_is_a_result_and_the_last_state_stays(write, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(executing, "write_atomically", full)
    result = run_notebook(find(str(write("print(1)"))), out=tmp_path / "runs")
    assert (result.status, result.error[:23]) == ("failed", "No space left on device")
    assert nbformat.read(tmp_path / "runs" / "small.ipynb", as_version=4).cells
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_texts_of_a_result_are_one_short_line():
    result = RunResult("a\x1b[1m", "failed", error="long " * 1000 + "\nend", line="x = '\x1b[2J'")
    assert result.name == "a" and result.line == "x = ''"
    assert len(result.error) < 700 and result.error.endswith("end") and "\n" not in result.error


def test_a_killed_kernel_leaves_the_partial_notebook(write, start, tmp_path):
    running = start("run", write("print('before')", WAIT))
    os.kill(pid_of(tmp_path), signal.SIGKILL)
    out, err = running.communicate(timeout=90)
    assert running.returncode == 1 and err == ""
    assert "small: Kernel died in cell 4: import os, pathlib, time (" in out
    assert "before" in outputs(tmp_path / "runs" / "small.ipynb")
