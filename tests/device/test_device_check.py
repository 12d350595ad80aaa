"""The device check itself, on made-up cores, and that every registered core can be run."""

import csv
import subprocess
import sys
from pathlib import Path

import device_check
import pytest
import torch
from device_check import HEADINGS, Core, Through, check, compare, load, main
from torch import nn
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
HERE = Path(__file__).parent

GOOD = """
import torch
from device_check import Core

CORES = [
    Core(
        "tidy",
        build=lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()),
        inputs=lambda: (torch.randn(4, 8),),
        plain=lambda core: lambda x: (x @ core[0].weight.T + core[0].bias).relu(),
        backward=True,
    )
]
"""
BROKEN = '''
import torch
from device_check import Core


def looks(x):
    """Asks for a value in the middle: no graph can hold that."""
    return x + 1 if x.sum().item() > 0 else x - 1


CORES = [Core("looks", build=lambda: looks, inputs=lambda: (torch.rand(4, 8),))]
'''


def folder_with(path, **files):
    for slug, text in files.items():
        (path / f"{slug}.py").write_text(text)
    return path


def run(folder, out, *arguments):
    options = ["--device", "cpu", "--folder", str(folder), "--out", str(out)]
    return main([*options, "--min-seconds", "0.001", *arguments])


def test_a_core_that_fails_is_a_line_and_the_others_run(tmp_path, capsys):
    folder = folder_with(tmp_path, aa_looks=BROKEN, bb_tidy=GOOD)
    assert run(folder, tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "1 of 2 cores are right" in shown and "tidy: right" in shown
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        looks, tidy = csv.DictReader(file)
    assert looks["verdict"].startswith("compiled: ") and looks["compiled"] == "-"
    assert looks["float32"] == "0e+00" and looks["our time"] != "-"  # the rest ran
    assert tidy["verdict"] == "right" and tidy["plain / ours"] != "-"
    assert 0 < float(tidy["float16"]) < float(tidy["bfloat16"]) < 0.05
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.startswith("Cores on cpu, PyTorch ") and text.count("\n| ") == 3


def test_the_command_as_make_calls_it(tmp_path):
    folder = folder_with(tmp_path, tidy=GOOD, looks=BROKEN)
    command = [sys.executable, HERE / "device_check.py", "--device", "cpu", "--folder", folder]
    command += ["--out", tmp_path / "out", "--min-seconds", "0.001"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1, ran.stderr
    assert "1 of 2 cores are right" in ran.stdout and "Traceback" not in ran.stderr
    only = subprocess.run([*command, "tidy"], capture_output=True, text=True, cwd=tmp_path)
    assert only.returncode == 0 and "1 of 1 cores" in only.stdout


def test_without_an_accelerator_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(device_check, "pick_device", lambda name: CPU)
    assert main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "make gpu: there is no accelerator (CUDA or MPS) here, so nothing was checked"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "no cores are registered for ['nonsense']; known: ['tidy']"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, message):
    folder = folder_with(tmp_path, tidy=GOOD)
    assert main(["--folder", str(folder), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("make gpu: ") and message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nonsense_that_is_not_here", "cannot be read: ModuleNotFoundError"),
        ("CORES = []", "cannot be read: ValueError: CORES must hold at least one core"),
        ("", "cannot be read: AttributeError"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_line_too(tmp_path, capsys, text, message):
    folder = folder_with(tmp_path, bad=text, tidy=GOOD)
    assert run(folder, tmp_path / "out") == 1
    assert message in (tmp_path / "out" / "table.csv").read_text()
    assert "1 of 2 cores are right" in capsys.readouterr().out


def test_no_core_starts_after_the_time_is_over(tmp_path, capsys):
    assert run(folder_with(tmp_path, tidy=GOOD), tmp_path / "out", "--minutes", "-1") == 1
    assert "not run: -1 minutes are over" in capsys.readouterr().out


# What counts as a trouble


def trouble(**options):
    core = Core("made up", **{"inputs": lambda: (torch.rand(4, 8),), **options})
    return check(core, CPU, "eager", min_seconds=0.001)


class Drifts(nn.Module):
    """Answers otherwise at every call, as a core does that is wrong on a device."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 1e-3 * self.calls


class WrongGradient(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        WrongGradient.calls += 1
        return (2 + 0.01 * WrongGradient.calls) * grad


def overflows(x):
    """Fine in full precision, infinite in half."""
    return (1e3 * x @ torch.ones(8, 8)) @ (10 * torch.ones(8, 8))


def test_results_that_differ_are_a_trouble():
    row = trouble(build=Drifts, compile=False, autocast=False, reason="made up")
    (told,) = row.troubles
    assert told.startswith("float32: AssertionError: output 0 is off by") and row.costs is not None
    assert (
        trouble(build=Drifts, compile=False, autocast=False, reason="x", tolerance=1).troubles == []
    )


def test_gradients_that_differ_are_a_trouble():
    apply = WrongGradient.apply
    options = dict(build=lambda: lambda x: apply(x), compile=False, autocast=False, reason="x")
    assert trouble(**options).troubles == []
    assert "float32" in trouble(**options, backward=True).troubles[0]


def test_half_precision_that_overflows_is_a_trouble():
    (told,) = trouble(build=lambda: overflows).troubles
    assert told.startswith("float16: ") and "not finite" in told


def test_each_stage_that_raises_is_told_by_its_name():
    def broken(x):
        raise RuntimeError("no kernel\nfor this")

    (told,) = trouble(build=lambda: broken).troubles
    assert told == "CPU: RuntimeError: no kernel"
    (told,) = trouble(build=lambda: torch.neg, plain=lambda core: broken).troubles
    assert told.startswith("costs: ValueError: method 'plain' raises: RuntimeError: no kernel")


def test_a_core_reached_through_a_function():
    core = Core(
        "doubled",
        build=lambda: Through(nn.Linear(3, 3), lambda layer, x, n: {"out": layer(x) * n}),
        inputs=lambda: (torch.randn(2, 3), 2),
        plain=lambda core: lambda x, n: n * core.module(x),
        backward=True,
    )
    row = check(core, CPU, "aot_eager", min_seconds=0.001)
    assert row.troubles == [] and row.costs.of("ours").trainable == 12


def test_settled_batch_norms_have_seen_the_batch():
    x = 3 + 2 * torch.randn(64, 4, 5)
    norm = device_check.settled(nn.Sequential(nn.BatchNorm1d(4)), x)
    assert not norm.training and norm[0].momentum == 0.1
    torch.testing.assert_close(norm[0].running_mean, x.mean((0, 2)))


def test_comparison():
    one = {"output 0": torch.tensor([1.0, -2.0]), "output 1": torch.tensor([1, 2])}
    near = {"output 0": torch.tensor([1.0, -2.1]), "output 1": torch.tensor([1, 2])}
    assert compare(one, one)[0] == 0
    assert compare(near, one) == (pytest.approx(0.05), "output 0")
    assert compare(near, one, rounded=True)[0] == pytest.approx(0.1 / 5**0.5)
    other = one | {"output 1": torch.tensor([1, 3])}
    assert compare(other, one, rounded=True)[0] == 0
    gradient = {"gradient of x": torch.tensor([1.0])}
    assert compare({"gradient of x": torch.tensor([1.5])}, gradient)[0] == pytest.approx(0.1)
    infinite = {"output 0": torch.tensor([1.0, torch.inf])}
    assert compare(infinite, infinite)[0] == 0
    for ours, reference, message in [
        (other, one, "output 1 is not the same"),
        ({"output 0": one["output 0"]}, one, "results are"),
        ({"output 0": torch.ones(3)}, {"output 0": torch.ones(2)}, "has shape"),
        ({"output 0": torch.tensor([1.0, torch.nan])}, infinite, "not finite"),
        ({"output 0": infinite["output 0"]}, {"output 0": torch.ones(2)}, "not finite"),
    ]:
        with pytest.raises(AssertionError, match=message):
            compare(ours, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": False}, "leaves a check out: reason must say why"),
        ({"autocast": False}, "leaves a check out: reason must say why"),
        ({"tolerance": {"float8": 1}}, r"got \['float8'\]"),
    ],
)
def test_a_registration_that_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Core("core", build=lambda: torch.neg, inputs=lambda: (torch.ones(1),), **options)


def test_headings_have_a_cell_each():
    row = trouble(build=lambda: torch.neg)
    shown = device_check.table([("made_up", row)])
    assert len(shown.rows[0]) == len(HEADINGS) and shown.rows[0][-1] == "right"


# The registered cores

REGISTERED, UNREADABLE = load(HERE)


def test_every_file_can_be_read():
    assert [row.verdict for row in UNREADABLE] == []


@pytest.mark.parametrize(
    "core",
    [core for _, core in REGISTERED],
    ids=[f"{slug}-{core.name}" for slug, core in REGISTERED],
)
def test_a_registered_core_and_its_plain_form_run(core, plain_python):
    method, inputs = core.build(), core.inputs()
    with torch.no_grad():
        outputs = tree_leaves(method(*inputs))
        assert all(x.isfinite().all() for x in outputs if isinstance(x, torch.Tensor))
        if core.plain:
            plain = tree_leaves(core.plain(method)(*inputs))
            assert [x.shape for x in plain] == [x.shape for x in outputs]
