"""What every test may use, and what the end of a test run says."""

import json
import sys

import pytest
import torch
from jaxtyping import config

SLOWEST_FIRST = ("test_notebooks.py", "test_repository.py")  # so that no worker waits at the end
SECONDS = "shuffle_nb/seconds"  # in pytest's cache


@pytest.fixture
def plain_python():
    """Switch the run-time shape checks off, as for a user: the package's own messages must do."""
    # All checked functions share one wrapper, and torch.compile counts recompilations by function.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def same_random_stream_for_each_test():
    """No test depends on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def agree(request):
    """Hold results against a case of the authors' own numbers, and against what was recorded.

    `agree(case, results)`: every expected result must be there, and be near enough.
    """
    from shuffle_nb.foundations.reference import AGREEMENT_FILE

    recorder = request.config.pluginmanager.get_plugin("tests.reference_record")

    def check(case, results):
        if recorder:
            recorder.begin(case)
        missing = [name for name in case.expected if name not in results]
        assert not missing, f"{case.slug}, case {case.name!r}: no result for {', '.join(missing)}"
        case.compare(results)
        worst = max(case.differences(results), key=lambda difference: difference.size)
        if recorder:
            recorder.keep(case, worst)
            return
        recorded = json.loads(AGREEMENT_FILE.read_text()) if AGREEMENT_FILE.is_file() else {}
        recorded = recorded.get(case.slug, {}).get(case.name)
        told = f"{case.slug}, case {case.name!r}: {worst.result} differs by {worst.size:.2g}"
        assert recorded, f"{told}, and nothing is recorded: call make reference"
        assert worst.size <= recorded["allowed"], f"{told}, recorded is {recorded}"

    return check


def pytest_collection_modifyitems(config, items):
    """Begin with the tests that took longest in the last run, or in the files that take longest."""
    seconds = remembered(config)

    def expected(item):
        slow_file = item.path.name in SLOWEST_FIRST
        return seconds.get(item.nodeid, 60 if slow_file and "[" in item.name else 0)

    items.sort(key=expected, reverse=True)


def remembered(config):
    """The seconds of each test in earlier runs on this machine."""
    cache = getattr(config, "cache", None)
    return cache.get(SECONDS, {}) if cache else {}


def pytest_terminal_summary(terminalreporter, config):
    """Say what each notebook cost and how it reads, and what else tests recorded."""
    reports = [r for name in ("passed", "failed") for r in terminalreporter.getreports(name)]
    if getattr(config, "cache", None) and not hasattr(config, "workerinput"):
        seconds = {report.nodeid: report.duration for report in reports}
        config.cache.set(SECONDS, remembered(config) | seconds)
    measured = dict(row for report in reports for row in report.user_properties)
    notebooks = {name: value for name, value in measured.items() if isinstance(value, dict)}
    if notebooks:
        terminalreporter.section("notebooks")
        for line in table(notebooks):
            terminalreporter.write_line(line)
    if others := {name: value for name, value in measured.items() if name not in notebooks}:
        terminalreporter.section("measured")
        for name, value in sorted(others.items()):
            terminalreporter.write_line(f"{name}  {value}")


COLUMNS = {  # heading: how to write it
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "training CPU s": lambda row: f"{row['training']:.1f}" if row.get("training") else "-",
    "words": lambda row: f"{row['words']:,}",
    "code lines": lambda row: f"{row['lines']:,}",
    "cells over 15 lines": lambda row: f"{row['long']:.0%}",
    "first result": lambda row: "-" if row["first"] is None else f"cell {row['first']}",
}


def table(notebooks):
    """One line a notebook, the slowest first."""
    order = sorted(notebooks, key=lambda name: -notebooks[name]["seconds"])
    width = max(map(len, notebooks))
    yield " ".join([" " * width, *(f"{heading:>{len(heading) + 1}}" for heading in COLUMNS)])
    for name in order:
        cells = [f"{write(notebooks[name]):>{len(head) + 1}}" for head, write in COLUMNS.items()]
        yield " ".join([f"{name:<{width}}", *cells])
