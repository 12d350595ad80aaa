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
from shuffle_nb.runner import execute as executing
from shuffle_nb.runner.catalogue import find
from shuffle_nb.runner.execute import (
    STORED,
    RunResult,
    check_folder,
    check_parameters,
    fits,
    prepare,
    read_options,
    read_value,
    reserve,
    run_notebook,
    run_notebooks,
    telling_line,
    write_atomically,
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
        ("-3", 1, -3),
        ("(0, 1)", [0], (0, 1)),
        ("[[1, -2], []]", [[0]], [[1, -2], []]),
        ("'it\\'s'", "text", "it's"),
        ("'a' or 'b'", "text", "'a' or 'b'"),
        ("{'window': 1}", {}, {"window": 1}),
        ("1e999", 0.1, float("inf")),
        ("(" * 500, [0], "(" * 500),
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


PLAIN = """lr = 0.1
seeds = [0]
rates = [0.5]
sizes = (1, 2)
nested = [[0]]
name = "a"
anything = None
layout = {}"""


@pytest.mark.parametrize(
    ("given", "arrives"),
    [
        ({"lr": 1}, {"lr": 1.0}),
        ({"seeds": (0, 1)}, {"seeds": [0, 1]}),
        ({"rates": [1, -2]}, {"rates": [1.0, -2.0]}),
        ({"sizes": [3]}, {"sizes": (3,)}),
        ({"nested": [(1, 2), []]}, {"nested": [[1, 2], []]}),
        ({"name": 'it\'s "quoted"\n{x}\\'}, {"name": 'it\'s "quoted"\n{x}\\'}),
        ({"anything": (1, None, [True])}, {"anything": (1, None, [True])}),
        ({"layout": {"window": (1, 2)}}, {"layout": {"window": (1, 2)}}),
    ],
)
def test_parameters_arrive_as_what_they_are(write, given, arrives):
    paper = find(str(write(parameters=PLAIN)))
    checked = check_parameters(paper, given)
    assert repr(checked) == repr(arrives)
    node = nbformat.reads(prepare(paper, checked), as_version=4)
    found = {}
    exec(node.cells[1].source, found)
    exec(node.cells[2].source, found)
    assert repr({name: found[name] for name in given}) == repr(arrives)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"lr": 10**400},
        {"rates": [1.0, float("inf")]},
        {"anything": object()},
        {"anything": [float("nan")]},
        {"layout": {"window": {1, 2}.__iter__()}},
    ],
)
def test_what_no_notebook_can_say_is_refused(write, given):
    with pytest.raises(ValueError, match="expects finite numbers, text, lists and the like"):
        check_parameters(find(str(write(parameters=PLAIN))), given)


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


# Runs


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
    from shuffle_nb.runner import page

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


# Many

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
