"""Small notebooks to run, and the command as a user calls it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from shuffle_nb.runner import cli

COMMAND = str(Path(sys.executable).with_name("shuffle-nb"))
TITLE = """# {name}

> A notebook for a test

- arxiv: 2401.00010
- authors: A. Author
- year: 2024
- categories: [example, shuffle]
- minutes: 3
"""


@pytest.fixture
def write(tmp_path):
    """A function that writes a notebook of some code cells below a title and parameters."""

    def write(*cells, name="small", parameters="steps = 3\nlr = 0.1\nseeds = [0]", folder=None):
        node = nbformat.v4.new_notebook()
        node.metadata["kernelspec"] = dict(name="python3", display_name="python3")
        tagged = {"tags": ["parameters"]}
        node.cells = [
            nbformat.v4.new_markdown_cell(TITLE.format(name=name)),
            nbformat.v4.new_code_cell(parameters, metadata=tagged),
            *map(nbformat.v4.new_code_cell, cells),
        ]
        path = (folder or tmp_path) / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(node, path)
        return path

    return write


@pytest.fixture
def shuffle_nb(tmp_path, monkeypatch, capsys):
    """The command, called in this process and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def shuffle_nb(*arguments):
        monkeypatch.setattr(sys, "argv", ["shuffle-nb", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=printed.out, stderr=printed.err)

    return shuffle_nb


def listen_to_ctrl_c():
    """Undo what a shell does to a job in the background: its children ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Start the command and leave it running; its whole process group ends with the test."""
    started = []

    def start(*arguments, command=COMMAND, **environment):
        process = subprocess.Popen(
            [command, *map(str, arguments)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=listen_to_ctrl_c,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
