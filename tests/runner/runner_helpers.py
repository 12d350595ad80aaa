"""What the tests of the runner share: cells that claim, processes that should be gone."""

import time
from pathlib import Path

import nbformat

MIME = "application/vnd.shuffle-nb.claims+json"
CLAIMS = f"""from IPython.display import display
record = dict(id="few", text="{{text}}", kind="count", paper="1", source="", ours=[{{ours}}],
              relation="<", bound=10.0, unit="", control=None, expected=True)
data = {{{{"{MIME}": {{{{"claims": [record], "date": "2026-01-01"}}}}, "text/plain": "claims"}}}}
display(data, raw=True)"""


def claim(ours="steps", text="steps are few"):
    """A cell that emits one claim, as check_claims does: `ours` must be below 10."""
    return CLAIMS.format(ours=ours, text=text)


def wait_until(happened, seconds=60):
    """Wait for a condition; returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (answer := happened()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return answer


def is_gone(pid):
    """Whether a process has ended (a zombie has, though nobody may have collected it)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def outputs(path):
    """All text that a notebook's cells printed."""
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


WAIT = """import os, pathlib, time
print("reached")
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)"""


def pid_of(folder):
    """The process that a WAIT cell runs in, once it has said so."""
    path = folder / "pid"
    return int(wait_until(lambda: path.is_file() and path.read_text()))
