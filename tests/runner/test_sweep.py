"""Sweeps: the grid, what is done stays done, workers that die, and a cluster of one's own."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from distributed import Client
from runner_helpers import claim, is_gone, wait_until

import shuffle_nb as package
from shuffle_nb.foundations.claims import Claim, claim_record
from shuffle_nb.runner import many
from shuffle_nb.runner import sweep as sweeping
from shuffle_nb.runner.catalogue import find
from shuffle_nb.runner.execute import Interrupted, RunResult
from shuffle_nb.runner.sweep import (
    axis_of,
    code_digest,
    grid_key,
    imported_names,
    label,
    load_record,
    read_grid,
    split_values,
    sweep_figure,
    sweep_rows,
)

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("1, 2", ["1", "2"]),
        ("[0],[1,2]", ["[0]", "[1,2]"]),
        ("[[1,2],[3]],[]", ["[[1,2],[3]]", "[]"]),
        ("'a,b',\"c,[\"", ["'a,b'", '"c,["']),
        ("(1,2),3", ["(1,2)", "3"]),
    ],
)
def test_commas_separate_and_brackets_hold_together(text, values):
    assert split_values(text) == values


def test_the_grid_is_every_combination_once(write):
    grid = read_grid(find(str(write())), ["lr=1,1.0,2e-1", "seeds=[0],[1, 2]"])
    assert grid == [
        {"lr": 1.0, "seeds": [0]},
        {"lr": 1.0, "seeds": [1, 2]},
        {"lr": 0.2, "seeds": [0]},
        {"lr": 0.2, "seeds": [1, 2]},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a sweep needs a parameter to sweep, such as -p seeds=\\[0\\],\\[1\\]"),
        (["steps=1,two"], "'steps' of small expects int \\(default 3\\), got 'two'"),
        (["steps=1,,2"], "'steps' of small expects int \\(default 3\\), got ''"),
        (["seeds=0,1"], "'seeds' of small expects list\\[int\\] \\(default \\[0\\]\\), got 0"),
        (["sedes=[0]"], "no parameter 'sedes'; did you mean 'seeds'"),
        (["lr=1", "lr=2"], "'lr' is given twice"),
    ],
)
def test_a_bad_grid_is_refused(write, options, message):
    with pytest.raises(ValueError, match=message):
        read_grid(find(str(write())), options)


def test_a_large_grid_answers_at_once(write, monkeypatch):
    reads = []
    read = sweeping.read_cells
    monkeypatch.setattr(sweeping, "read_cells", lambda path: reads.append(path) or read(path))
    many = ",".join(map(str, range(300)))
    began = time.perf_counter()
    grid = read_grid(find(str(write())), [f"steps={many}", f"lr={many}"])
    assert len(grid) == 90_000 and len(reads) == 1
    with pytest.raises(ValueError, match="jobs expects a number from 1 up, got 0"):
        sweeping.sweep(find(str(write())), [f"steps={many}", f"lr={many}"], jobs=0)
    assert time.perf_counter() - began < 5


def test_settings_are_said_as_a_person_would():
    settings = {"layout": {"window": 1}, "seeds": [0, 1], "pairs": [(0, 1), (2, 3)], "arm": "plain"}
    assert label(settings) == "layout window 1, seeds 0, 1, pairs (0, 1), (2, 3), arm plain"
    assert label({"seeds": [0], "none": None, "empty": []}) == "seeds 0, none None, empty []"


def test_the_key_follows_code_and_parameters_but_not_prose(write):
    def key(*cells, parameters, prose=""):
        path = write(*cells)
        text = path.read_text()
        path.write_text(text.replace("A notebook for a test", f"A notebook for a test{prose}"))
        return grid_key(code_digest(find(str(path))), parameters)

    first = key("print(1)", parameters={"lr": 1.0, "steps": 2})
    assert first == key("print(1)", parameters={"steps": 2, "lr": 1.0}, prose="more words")
    assert first != key("print(2)", parameters={"lr": 1.0, "steps": 2})
    assert first != key("print(1)", parameters={"lr": 1.0, "steps": 3})
    assert first != key("print(1)", parameters={"lr": 1.0, "steps": 2.0})


@pytest.mark.parametrize(
    ("code", "package", "names"),
    [
        ("import a.b as c, d", "", {"a.b", "d"}),
        ("from a import b", "", {"a", "a.b"}),
        ("def f():\n    from . import b", "p.q", {"p.q", "p.q.b"}),
        ("from ..x import y", "p.q", {"p.x", "p.x.y"}),
    ],
)
def test_imports_are_found_wherever_they_stand(code, package, names):
    assert imported_names(code, package) == names


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """A package of three modules in a chain, one more, and data, in the place of our own."""
    folder = tmp_path / "site" / "shuffle_nb"
    chain = {"a.first": "from ..b import second", "b.second": "import shuffle_nb.b.third"}
    for name, code in {**chain, "b.third": "x = 1", "c.other": "y = 1"}.items():
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(code)
    (folder / "__init__.py").touch()
    (folder / "b" / "weights.npy").write_text("1")
    monkeypatch.setattr(package, "__file__", str(folder / "__init__.py"))
    return folder


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("a/first.py", True),
        ("b/third.py", True),
        ("b/__init__.py", True),
        ("b/weights.npy", True),
        ("c/other.py", False),
        ("../../helper.py", True),
        ("../../stranger.py", False),
    ],
)
def test_the_key_follows_every_module_behind_the_notebook(write, small_package, changed, counts):
    (small_package.parents[1] / "helper.py").write_text("import json")
    path = write("%matplotlib inline\nfrom shuffle_nb.a.first import x", "import helper", "1 +")
    before = code_digest(find(str(path)))
    assert before == code_digest(find(str(path)))
    with (small_package / changed).open("a") as file:
        file.write("\n# changed")
    assert (code_digest(find(str(path))) != before) == counts


@pytest.mark.parametrize("text", ["{", "3", "[]", "{}", '{"status": "ok"}', "\xff", None])
def test_a_record_that_cannot_be_read_is_named_and_runs_again(tmp_path, text):
    path, told = tmp_path / "key.json", []
    path.mkdir() if text is None else path.write_text(text, encoding="latin-1")
    assert load_record(tmp_path, "key", told.append) is None
    assert told == [f"{path} cannot be read: its cell runs again"]
    assert load_record(tmp_path, "other", told.append) is None and len(told) == 1


def record(status="ok", claims=(), **parameters):
    return dict(status=status, claims=list(claims), seconds=1.0, parameters=parameters)


def fact(text="few", ours=1.0, bound=2, **changes):
    return claim_record(Claim(text, text, "count", ours, "<", bound, paper="1", unit="s")) | changes


def test_rows_are_tidy_and_name_clashes_are_resolved():
    control = {"name": "off", "values": [3.0]}
    facts = fact(ours=(1.0, 2.0), control=control)
    rows = sweep_rows([record(claims=[facts], values=[7]), record("failed", values=[8])])
    first, last = rows
    assert list(first) == list(last)
    assert (first["values (parameter)"], first["claim"], first["ours"]) == ([7], "few", 1.5)
    assert (first["values"], first["control"], first["control values"]) == ("1.0 2.0", "off", "3.0")
    assert (last["values (parameter)"], last["claim"], last["status"]) == ([8], None, "failed")


@pytest.mark.parametrize(
    ("values", "axis"),
    [
        ([1, 2], ([1.0, 2.0], ["1", "2"], "linear")),
        ([1e-3, 1e-1], ([1e-3, 1e-1], ["0.001", "0.1"], "log")),
        ([0, 100], ([0.0, 100.0], ["0", "100"], "linear")),
        (["a", "b"], ([0.0, 1.0], ["a", "b"], "linear")),
        ([True, False], ([0.0, 1.0], ["True", "False"], "linear")),
    ],
)
def test_axes_suit_their_values(values, axis):
    assert axis_of(values) == axis


@pytest.mark.parametrize("ours", [(1.0, 1.5), float("nan"), float("inf")])
def test_the_figure_has_a_panel_a_claim_with_its_bound(ours):
    facts = [fact(text, ours) for text in ("few", "small")]
    rows = sweep_rows([record(claims=facts, lr=lr, arm=arm) for lr in (1, 2) for arm in "ab"])
    figure = sweep_figure(rows, ["lr", "arm"], "a title")
    panels = [panel for panel in figure.axes if panel.axison]
    assert [panel.get_title(loc="left") for panel in panels] == ["few", "small"]
    assert {panel.get_xlabel() for panel in panels} == {"lr"}
    assert all("< 2 s" in panel.get_ylabel() for panel in panels)
    figure.canvas.draw()


def test_a_bound_that_varies_is_drawn_along():
    rows = sweep_rows([record(claims=[fact(bound=2 * lr)], lr=lr) for lr in (1, 2)])
    (panel,) = sweep_figure(rows, ["lr"], "a title").axes
    dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in dashed] == [[2, 4]]
    assert "< dashed" in panel.get_ylabel()


def test_the_figure_of_a_sweep_without_claims_can_be_drawn():
    sweep_figure(sweep_rows([record("failed", lr=1)]), ["lr"], "nothing").canvas.draw()


CELL = """import os, pathlib, signal, time
folder = pathlib.Path({folder!r})
with (folder / "log").open("a") as log:
    print(steps, seeds, file=log)
if (steps, seeds) == (2, [0]) and not (folder / "mark").exists():
    (folder / "mark").touch()
    os.kill(os.getppid(), signal.SIGKILL)  # the worker
    time.sleep(9)
assert (steps, seeds) != (20, [1]) or (folder / "fixed").exists(), "broken"
"""


def test_a_sweep_survives_a_worker_and_goes_on_where_it_stopped(write, shuffle_nb, tmp_path):
    path = write(CELL.format(folder=str(tmp_path)), claim("steps"))
    log, out = tmp_path / "log", tmp_path / "runs" / "sweeps" / "small"
    command = ["sweep", path, "-p", "steps=2,20", "-p", "seeds=[0],[1]", "--jobs", "2"]

    done = shuffle_nb(*command)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "small: steps 20, seeds 1: AssertionError: broken in cell 3: assert (" in done.stdout
    assert "1 of 4 failed" in done.stdout
    assert len(log.read_text().splitlines()) == 5  # four cells, one of them twice
    (table,) = out.glob("*.csv")
    rows = pd.read_csv(table)
    assert sorted(zip(rows["steps"], rows["status"], strict=True)) == [
        (2, "ok"),
        (2, "ok"),
        (20, "failed"),
        (20, "not held"),
    ]

    (tmp_path / "fixed").touch()
    done = shuffle_nb(*command)
    assert done.returncode == 0, done.stderr
    assert "3 of 4 already done" in done.stdout
    assert log.read_text().splitlines()[5:] == ["20 [1]"]
    rows = pd.read_csv(table)
    assert list(rows["holds"]) == [True, True, False, False]
    assert list(rows["ours"]) == [2, 2, 20, 20]
    assert list(rows["seeds"]) == ["[0]", "[1]"] * 2
    assert set(rows) >= {
        "id",
        "claim",
        "values",
        "relation",
        "bound",
        "control",
        "verdict",
        "status",
    }
    assert {path.suffix for path in (out / "cells").iterdir()} == {".json", ".ipynb"}

    # Another grid in the same folder has a table and a figure of its own, and runs nothing anew.
    before = table.read_bytes()
    done = shuffle_nb("sweep", path, "-p", "steps=2", "-p", "seeds=[0],[1]")
    assert done.returncode == 0 and "2 of 2 already done" in done.stdout
    assert table.read_bytes() == before and len(list(out.glob("*.csv"))) == 2
    assert len(list(out.glob("*.png"))) == 2
    assert len(log.read_text().splitlines()) == 6

    # A record that was damaged is named, and its cell runs again.
    damaged = next((out / "cells").glob("*.json"))
    damaged.write_text("{")
    done = shuffle_nb(*command)
    assert f"{damaged.name} cannot be read: its cell runs again" in done.stdout
    assert "3 of 4 already done" in done.stdout
    assert len(log.read_text().splitlines()) == 7


WAIT_ONCE = """import json, os, pathlib, time
folder = pathlib.Path({folder!r})
started = folder / f"{{steps}}.json"
if not started.exists():
    part = started.with_suffix(".part")
    part.write_text(json.dumps([os.getppid(), os.getpid()]))
    part.rename(started)
    time.sleep(3600 if steps == 1 else 0)
"""


@pytest.fixture
def cluster(start, tmp_path):
    """A real scheduler and two workers, without nannies, each in a folder of its own."""
    dask = Path(sys.executable).with_name("dask")
    file = tmp_path / "scheduler.json"
    network = ["--host", "127.0.0.1", "--no-dashboard"]
    start(
        "scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0", *network,
        "--scheduler-file", file, command=dask,
    )  # fmt: skip
    wait_until(file.is_file)
    workers = [
        start(
            "worker", "--scheduler-file", file, "--nthreads", "1", "--no-nanny",
            "--dashboard-address", "127.0.0.1:0", *network,
            "--local-directory", tmp_path / f"worker-{number}", command=dask,
        )
        for number in range(2)
    ]  # fmt: skip
    address = json.loads(file.read_text())["address"]
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    return address, {worker.pid for worker in workers}


def test_a_users_own_cluster_may_lose_a_worker(write, start, tmp_path, cluster):
    address, workers = cluster
    path = write(WAIT_ONCE.format(folder=str(tmp_path)), claim("steps"))
    running = start("sweep", path, "-p", "steps=1,2,3", "--scheduler", address)
    worker, kernel = json.loads(
        wait_until(lambda: (file := tmp_path / "1.json").is_file() and file.read_text())
    )
    assert worker in workers
    os.kill(worker, signal.SIGKILL)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert err == ""
    (table,) = (tmp_path / "runs" / "sweeps" / "small").glob("*.csv")
    assert list(pd.read_csv(table)["status"]) == ["ok"] * 3
    assert "small: steps 1: 1 of 1 claims hold" in out
    wait_until(lambda: is_gone(kernel))


def test_a_scheduler_that_does_not_answer_is_bad_input(write, shuffle_nb, tmp_path):
    done = shuffle_nb("run", write(), "--scheduler", "tcp://127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr == "shuffle-nb: no Dask scheduler answers at tcp://127.0.0.1:1\n"
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_keeps_the_finished_cells_of_a_sweep(write, tmp_path, monkeypatch):
    def one_and_then_ctrl_c(jobs, on_done, *_):
        jobs = list(jobs)
        on_done(jobs[0], RunResult(jobs[0].name, "ok", 1.0), jobs[0].notebook)
        on_done(jobs[1], RunResult(jobs[1].name, "interrupted", 1.0), jobs[1].notebook)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "run_jobs", one_and_then_ctrl_c)
    paper = find(str(write()))
    with pytest.raises(Interrupted) as interruption:
        sweeping.sweep(paper, ["steps=1,2,3"], out=tmp_path / "out")
    assert [result.status for result in interruption.value.results] == ["ok", "interrupted"]

    told = []
    with pytest.raises(Interrupted):
        sweeping.sweep(paper, ["steps=1,2,3"], out=tmp_path / "out", tell=told.append)
    assert told == ["1 of 3 already done"]


def test_the_package_digest_follows_every_module(small_package):
    before = many.package_digest()
    (small_package / "c" / "other.py").write_text("y = 2")
    assert many.package_digest() != before
