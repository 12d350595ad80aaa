"""Kernels for the tests of notebooks, forked from one process that has imported the libraries.

A kernel that starts cold spends seconds of processor time on imports before its first cell. Here a
process of its own imports them once, does nothing else, and forks a child for each notebook. What a
child may notice is the same as in a cold kernel: arguments, environment, working folder, fresh
random numbers. Children die with that process, and that process dies with the tests.

Where anything is in doubt (no Linux, an accelerator, a running thread, another environment), the
kernel starts cold.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

WARM = (
    "torch",
    "torch._dynamo",  # the first optimiser asks for it
    "numpy",
    "matplotlib.pyplot",
    "einops",
    "jaxtyping",
    "pandas",
    "sklearn.datasets",
    "skimage.data",
    "networkx",
    "ipywidgets",
    "ipykernel.kernelapp",
    "shuffle_nb.foundations.datasets",
    "shuffle_nb.foundations.training",
    "shuffle_nb.foundations.costs",
    "shuffle_nb.foundations.figures",
)
# Set anew for each kernel; whatever else the environment holds, a library may read at its import.
BY_KERNEL = ("PYTEST_CURRENT_TEST", "JPY_PARENT_PID", "JPY_SESSION_NAME")
# pandas brings pyarrow, whose allocator starts a thread at its import, unless it is told not to.
NO_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
PATIENCE = 300  # seconds for all imports; a machine may stall for a minute


class ForkedKernel:
    """A child of the warm process, with as much of Popen as jupyter_client asks for."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None
        try:
            self._handle = os.pidfd_open(pid)  # a number that no other process can inherit
        except ProcessLookupError:
            self._handle, self.returncode = None, 1

    def poll(self) -> int | None:
        if self._handle is not None and select.select([self._handle], [], [], 0)[0]:
            os.close(self._handle)
            self._handle, self.returncode = None, 1  # how it ended, only its parent knows
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        ends = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > ends:
                raise subprocess.TimeoutExpired("forked kernel", timeout)
            select.select([self._handle], [], [], 0.1)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmKernels:
    """Starts kernels in the place of `jupyter_client.launcher.launch_kernel`."""

    def __init__(
        self,
        cold,  # launch_kernel itself
        modules: tuple[str, ...] = WARM,  # what the warm process imports
    ):
        self.cold, self.modules = cold, modules
        self.process, self.environment = None, None

    def launch(self, command: list[str], **options):
        """Fork a kernel, or start it cold where that is not safe."""
        try:
            pid = self._fork(command, dict(options.get("env") or os.environ), options.get("cwd"))
        except (OSError, ValueError):  # the warm process is gone or answers nonsense
            self.close()
            pid = None
        return self.cold(command, **options) if pid is None else ForkedKernel(pid)

    def _fork(self, command: list[str], environment: dict, folder: str | None) -> int | None:
        if sys.platform != "linux" or "ipykernel_launcher" not in command:
            return None
        if self.process is None:
            self._start(environment)
        if self.environment != without(environment, BY_KERNEL):
            return None
        order = {
            "arguments": command[command.index("ipykernel_launcher") + 1 :],
            "environment": without(environment, ("JPY_PARENT_PID",)),
            "folder": str(folder or Path.cwd()),
        }
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise OSError("no answer")
        return json.loads(self.process.stdout.readline())["pid"]

    def _start(self, environment: dict) -> None:
        self.environment = without(environment, BY_KERNEL)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-Xfrozen_modules=off", __file__, *self.modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment | NO_THREAD,
        )

    def close(self) -> None:
        """End the warm process, and with it every kernel that it forked."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def without(names: dict, left_out: tuple[str, ...]) -> dict:
    return {name: value for name, value in names.items() if name not in left_out}


# From here on: what runs in the warm process.


def die_with(parent: int) -> None:
    """Have the kernel of the system kill this process as soon as its parent ends."""
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def become_kernel(order: dict, parent: int) -> None:
    """Turn a fresh child into a notebook's kernel; never returns."""
    status = 1
    try:
        die_with(parent)
        os.setsid()  # before the tests know of it: they signal its whole group
        print(json.dumps({"pid": os.getpid()}), flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(2, 1)  # the pipes to the tests are not the child's
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"], JPY_PARENT_PID=str(parent))
        for name in ("random", "numpy.random", "torch"):
            if name in sys.modules:  # it drew its seed as it was imported, once for all children
                sys.modules[name].seed()
        watched = f"--IPKernelApp.parent_handle={parent}"  # read as ipykernel was imported
        sys.argv = ["ipykernel_launcher", *order["arguments"], watched]
        gc.enable()
        importlib.import_module("ipykernel.kernelapp").launch_new_instance()
        status = 0
    finally:
        os._exit(status)


def serve(modules: list[str]) -> None:
    """Import, then fork a kernel for each line on standard input."""
    die_with(os.getppid())
    for name in modules:
        importlib.import_module(name)
    me = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    gc.collect()
    gc.freeze()  # the children share these pages
    for line in sys.stdin:
        alone = (
            len(list(Path("/proc/self/task").iterdir())) == 1
        )  # a fork copies one thread, and no lock
        if not alone:
            print(json.dumps({"pid": None}), flush=True)
        elif os.fork() == 0:
            become_kernel(json.loads(line), me)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.argv[1:])
