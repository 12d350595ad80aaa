"""One notebook or many: parameters, numbering, failure, death, interruption."""

import os
import re
import signal
import sys
import threading
from pathlib import Path

import nbformat
import pytest
from runner_helpers import claim, is_gone, outputs, wait_until

import shuffle_nb
from shuffle_nb.runner.catalogue import find
from shuffle_nb.runner.execute import (
    check_parameters,
    fits,
    read_options,
    read_value,
    reserve,
    run_notebook,
    run_notebooks,
)

pytestmark = pytest.mark.timeout(300)
WAIT = """import os, pathlib, time
print("reached")
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)"""


def pid_of(folder):
    """The process that a WAIT cell runs in, once it has said so."""
    path = folder / "pid"
    return int(wait_until(lambda: path.is_file() and path.read_text()))


# Parameters


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 1, 3),
        ("1e-3", 0.1, 1e-3),
        ("1", "text", "1"),
        ("'1'", "text", "1"),
        ("true", False, True),
        ("False", True, False),
        ("[1, 2]", [0], [1, 2]),
        ("abc", 1, "abc"),
        ("None", None, None),
    ],
)
def test_text_is_read_by_the_type_of_the_default(text, default, value):
    assert read_value(text, default) == value


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        (1, 0.5, True),
        (0.5, 1, False),
        (True, 1, False),
        (1, True, False),
        (True, 0.5, False),
        ("a", "b", True),
        (1, "b", False),
        ([1, 2], [0], True),
        ([1, "a"], [0], False),
        ([0.5], [1], False),
        ([1], [0.5], True),
        ([], [1], True),
        (["a"], [], True),
        (1, [1], False),
        (object(), None, True),
    ],
)
def test_types_are_strict(value, default, expected):
    assert fits(value, default) is expected


def test_an_int_for_a_float_becomes_one(write):
    paper = find(str(write()))
    checked = check_parameters(paper, {"lr": 1})
    assert checked == {"lr": 1.0} and isinstance(checked["lr"], float)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"stesp": 1},
            "small has no parameter 'stesp'; did you mean 'steps'? it knows: steps, lr, seeds",
        ),
        ({"zzz": 1}, "small has no parameter 'zzz'; it knows: steps, lr, seeds"),
        ({"steps": "abc"}, "parameter 'steps' of small expects int (default 3), got 'abc'"),
        ({"seeds": ["a"]}, "parameter 'seeds' of small expects list[int] (default [0]), got ['a']"),
    ],
)
def test_a_bad_parameter_is_one_clear_line_and_nothing_is_written(write, tmp_path, given, message):
    paper = find(str(write()))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_notebook(paper, given, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_missing_device_is_refused(write):
    paper = find(str(write(parameters="device = 'auto'")))
    with pytest.raises(ValueError, match="device 'cuda:99' is not available on this machine"):
        check_parameters(paper, {"device": "cuda:99"})
    assert check_parameters(paper, {"device": "cuda:99"}, device_here=False)


def test_a_parameters_cell_that_cannot_be_read_is_named(write):
    with pytest.raises(ValueError, match="tagged 'parameters' is not plain Python"):
        check_parameters(find(str(write(parameters="steps = = 3"))), {"steps": 3})


def test_an_unknown_scale_is_refused(write):
    paper = find(str(write(parameters="scale = 'laptop'")))
    with pytest.raises(ValueError, match="'scale' expects laptop or full, got 'huge'"):
        check_parameters(paper, {"scale": "huge"})


@pytest.mark.parametrize("option", ["steps", "steps=", "=3", "="])
def test_an_option_without_name_or_value_is_refused(option):
    with pytest.raises(ValueError, match="given as name=value"):
        read_options([option])


# Places


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


def test_a_file_in_the_way_is_bad_input(write, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ValueError, match="cannot write into"):
        run_notebook(find(str(write())), out=tmp_path / "runs")


# Runs


def test_a_run_measures_its_claims_with_the_given_parameters(write, tmp_path):
    path = write("print(steps, lr)", claim("steps"))
    before = path.read_bytes()
    result = run_notebook(find(str(path)), {"steps": 7, "lr": 1}, out=tmp_path / "{runs} here")
    assert result.ok and result.claims[0]["ours"] == 7
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
    assert re.search(r"few steps +│ - +│ 40 ± 0.1 +│ < 10 +│ NO", done.stdout)


def test_claim_not_met_still_brings_the_claims(write, tmp_path):
    stop = "class ClaimNotMet(AssertionError): pass\nraise ClaimNotMet('1 of 1 claims do not hold')"
    path = write(claim("40"), stop, "print('never')")
    result = run_notebook(find(str(path)), out=tmp_path / "runs")
    assert (result.status, result.ok) == ("not held", False)
    assert result.error == "ClaimNotMet: 1 of 1 claims do not hold"
    assert [claim["holds"] for claim in result.claims] == [False]
    assert outputs(result.notebook) == ""


def test_a_failing_cell_is_named_and_the_rest_is_there(write, shuffle_nb, tmp_path):
    path = write("print('before')", "#| exports\n\nanswer = 1 / 0", "print('after')")
    done = shuffle_nb("run", path, "-p", "steps=4")
    assert done.returncode == 1 and done.stderr == ""
    assert "small: ZeroDivisionError: division by zero in cell 4: answer = 1 / 0 (" in done.stdout
    assert "partial notebook: runs/small.ipynb" in done.stdout
    assert outputs(tmp_path / "runs" / "small.ipynb") == "before\n"


def test_a_killed_kernel_leaves_the_partial_notebook(write, start, tmp_path):
    running = start("run", write("print('before')", WAIT))
    os.kill(pid_of(tmp_path), signal.SIGKILL)
    out, err = running.communicate(timeout=90)
    assert running.returncode == 1 and err == ""
    assert "small: Kernel died in cell 4: import os, pathlib, time (" in out
    assert "before" in outputs(tmp_path / "runs" / "small.ipynb")


def test_ctrl_c_leaves_the_partial_notebook_and_no_kernel(write, start, tmp_path):
    running = start("run", write("print('before')", WAIT), write(name="next"))
    pid = pid_of(tmp_path)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    out, err = running.communicate(timeout=90)
    assert running.returncode == 130
    assert err == "shuffle-nb: interrupted: small in cell 4: import os, pathlib, time\n"
    assert "partial notebook: runs/small.ipynb" in out
    assert "before" in outputs(tmp_path / "runs" / "small.ipynb")
    assert not (tmp_path / "runs" / "next.ipynb").exists()
    wait_until(lambda: is_gone(pid))


def test_ctrl_c_among_many_keeps_what_each_had_done(write, start, tmp_path):
    slow = WAIT.replace('"pid"', 'f"{name}.pid"')
    names = ("left", "right")
    paths = [write(f"name = {name!r}", "print('before')", slow, name=name) for name in names]
    running = start("run", write("print('done')"), *paths, "--jobs", "2")
    files = [tmp_path / f"{name}.pid" for name in names]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files))
    os.killpg(running.pid, signal.SIGINT)
    err = running.communicate(timeout=90)[1]
    assert running.returncode == 130, err
    assert err.startswith("shuffle-nb: interrupted: ") and err.count("\n") == 1
    assert err.count("in cell 5: import os, pathlib, time") == 2
    for name in names:
        assert outputs(tmp_path / "runs" / f"{name}.ipynb") == "before\n"
    assert outputs(tmp_path / "runs" / "small.ipynb") == "done\n"
    wait_until(lambda: all(is_gone(int(file.read_text())) for file in files))


# Many

# A cell's parent process is the worker.
KILL_WORKER = """import os, signal, time
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


def test_a_page_describes_its_images_and_holds_them(write, tmp_path):
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    path = write(f"#| fig-alt: A line that rises\n{figure}")
    result = run_notebook(find(str(path)), out=tmp_path / "runs", html=True)
    page = result.html.read_text()
    assert 'alt="A line that rises"' in page and "data:image/png;base64" in page


def test_results_of_the_same_notebook_get_names_of_their_own(write, tmp_path):
    paper = find(str(write("print(steps)")))
    results = run_notebooks([(paper, {"steps": 1}), (paper, {"steps": 2})], out=tmp_path / "runs")
    assert [result.name for result in results] == ["small", "small (2)"]
    assert [outputs(result.notebook).strip() for result in results] == ["1", "2"]
    assert nbformat.read(results[1].notebook, as_version=4)
    assert Path(results[1].notebook).name == "small-2.ipynb"
