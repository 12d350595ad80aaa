"""Forked kernels are like cold ones to their notebook, and never outlive the tests."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import write_connection_file
from warm_kernels import ForkedKernel, WarmKernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks kernels only on Linux")
FEW = ("numpy", "ipykernel.kernelapp")  # quick to import


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Kernels write their connection files into the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kernels():
    """A warm process that refuses to start anything cold."""

    def cold(command, **options):
        raise AssertionError("started cold")

    with contextlib.closing(WarmKernels(cold, FEW)) as kernels:
        yield kernels


def start(kernels, folder, **options):
    """Start a kernel in a folder; returns it with a client."""
    file, _ = write_connection_file(str(folder / f"kernel-{time.monotonic_ns()}.json"))
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", file, "--log-level=50"]
    kernel = kernels.launch(command, cwd=str(folder), **options)
    client = BlockingKernelClient(connection_file=file)
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=300)
    return kernel, client


def answer(client, code):
    """What a kernel prints as JSON."""
    said = []

    def listen(message):
        said.append(message["content"].get("text", ""))

    client.execute_interactive(
        f"import json; print(json.dumps({code}))", output_hook=listen, timeout=300
    )
    return json.loads("".join(said))


def gone(pid):
    """Whether a process has ended, or soon does."""
    for _ in range(200):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.05)
                continue
        return True
    return False


def test_a_forked_kernel_has_its_own_folder_environment_group_and_random_numbers(
    kernels, tmp_path, monkeypatch
):
    code = (
        "[__import__('os').getcwd(), dict(__import__('os').environ), __import__('sys').argv[0],"
        " __import__('os').getpgid(0), __import__('random').random(),"
        " __import__('numpy').random.rand(), 'numpy' in globals()]"
    )
    seen = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("PYTEST_CURRENT_TEST", name)
        kernel, client = start(kernels, tmp_path / name)
        seen.append(answer(client, code))
        assert seen[-1][:1] == [str(tmp_path / name)]
        assert seen[-1][1]["PYTEST_CURRENT_TEST"] == name
        assert "JE_ARROW_MALLOC_CONF" not in seen[-1][1], "the warm process's own"
        assert seen[-1][2] == "ipykernel_launcher"
        assert seen[-1][3] == kernel.pid == os.getpgid(kernel.pid)
        assert seen[-1][6] is False
        assert kernel.poll() is None
        kernel.kill()
        assert kernel.wait(timeout=300) == kernel.returncode != 0
        client.stop_channels()
    assert seen[0][4] != seen[1][4] and seen[0][5] != seen[1][5], "two children drew the same"


def test_a_forked_kernel_is_interrupted_and_ends_with_a_signal(kernels, tmp_path):
    kernel, client = start(kernels, tmp_path)
    waiting = client.execute("import time; time.sleep(600)")
    time.sleep(0.5)
    kernel.send_signal(signal.SIGINT)
    while (reply := client.get_shell_msg(timeout=300))["parent_header"]["msg_id"] != waiting:
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    with pytest.raises(subprocess.TimeoutExpired):
        kernel.wait(timeout=0.1)
    kernel.terminate()
    kernel.wait(timeout=300)
    kernel.kill()  # of what is gone: nothing happens
    client.stop_channels()


def test_kernels_end_with_the_warm_process(kernels, tmp_path):
    kernel, client = start(kernels, tmp_path)
    client.stop_channels()
    kernels.close()
    assert gone(kernel.pid)


TESTS_THAT_ARE_KILLED = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from test_warm_kernels import FEW, WarmKernels, start
kernels = WarmKernels(None, FEW)
kernel, client = start(kernels, Path({folder!r}))
print(kernels.process.pid, kernel.pid, flush=True)
time.sleep(600)
"""


def test_kernels_end_with_tests_that_are_killed(tmp_path):
    folder = Path(__file__).parent
    script = TESTS_THAT_ARE_KILLED.format(tests=str(folder), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as tests:
        pids = [int(pid) for pid in tests.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(gone_now, pids))
        tests.kill()
    assert all(map(gone, pids))


def gone_now(pid):
    return not Path(f"/proc/{pid}").exists()


COLD = object()


def cold(command, **options):
    return COLD


COMMAND = [sys.executable, "-m", "ipykernel_launcher", "-f", "nowhere.json"]


def test_another_environment_starts_cold():
    with contextlib.closing(WarmKernels(cold, ())) as kernels:
        assert isinstance(kernels.launch(COMMAND), ForkedKernel)
        assert kernels.launch(COMMAND, env=os.environ | {"OMP_NUM_THREADS": "7"}) is COLD
        assert kernels.launch(["ir", "kernel"]) is COLD


def test_a_warm_process_that_is_gone_is_replaced_and_the_kernel_starts_cold():
    with contextlib.closing(WarmKernels(cold, ())) as kernels:
        kernels.launch(COMMAND)
        kernels.process.kill()
        kernels.process.wait()
        assert kernels.launch(COMMAND) is COLD
        assert isinstance(kernels.launch(COMMAND), ForkedKernel)


def test_a_module_that_starts_a_thread_makes_every_kernel_cold(tmp_path, monkeypatch):
    (tmp_path / "thready.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=[600], daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with contextlib.closing(WarmKernels(cold, ("thready",))) as kernels:
        assert kernels.launch(COMMAND) is COLD


def test_a_module_that_cannot_be_imported_makes_every_kernel_cold():
    with contextlib.closing(WarmKernels(cold, ("no_such_module",))) as kernels:
        assert kernels.launch(COMMAND) is COLD
