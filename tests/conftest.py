"""What every test may use, and what the end of a test run says."""

import sys

import pytest
import torch
from jaxtyping import config

SLOWEST_FIRST = ("test_notebooks.py", "test_repository.py")  # so that no worker waits at the end


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


def pytest_collection_modifyitems(items):
    """Begin with the files whose single tests take longest."""
    items.sort(key=lambda item: item.path.name not in SLOWEST_FIRST)


def pytest_terminal_summary(terminalreporter):
    """List what the tests measured with `record_property`, such as a notebook's seconds."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = sorted({row for report in reports for row in report.user_properties if row[1]})
    if rows:
        terminalreporter.section("measured")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            terminalreporter.write_line(f"{name:<{width}}  {value}")
