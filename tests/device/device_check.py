"""Run every registered core on the accelerator: `make gpu`.

Each core must give the CPU's result, run under autocast in both half precisions, and compile to one
graph that gives the eager result. A table says how near they come, and what each core costs beside
its plain form. Papers register in a file of their own here: `<slug>.py` with a list `CORES`.
"""

import argparse
import contextlib
import copy
import csv
import importlib.util
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shuffle_nb.foundations.claims import Table, plain_text, readable
from shuffle_nb.foundations.costs import Costs, compare_costs
from shuffle_nb.foundations.training import pick_device

HERE = Path(__file__).parent
# How far from the CPU's result, relative to it. Half precision keeps 11 or 8 bits of a number.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2, "compiled": 1e-4}
GRADIENTS = 5  # gradients pass through the network twice: so many times the tolerance


@dataclass(frozen=True)
class Core:
    """A core, its inputs, and the plain way to do the same: made on the CPU, moved from there."""

    name: str
    build: Callable[[], Callable]  # a module, or a function that keeps no tensors of its own
    inputs: Callable[[], tuple]  # sizes for an accelerator; the CPU runs them once
    plain: Callable[[Callable], Callable] | None = None  # core -> callable with its weights
    backward: bool = False  # gradients of floating-point inputs and parameters too
    tolerance: float | Mapping[str, float] | None = None  # of float32 and compiled, or by name
    compile: bool = True
    autocast: bool = True
    reason: str = ""  # why one of them is left out

    def __post_init__(self):
        if not (self.compile and self.autocast) and not self.reason:
            raise ValueError(f"core {self.name!r} leaves a check out: reason must say why")
        if unknown := set(self.tolerances) - set(TOLERANCES):
            raise ValueError(f"tolerance has keys {list(TOLERANCES)}, got {sorted(unknown)}")

    @property
    def tolerances(self) -> dict[str, float]:
        """The tolerance of each check."""
        if isinstance(self.tolerance, Mapping):
            return TOLERANCES | dict(self.tolerance)
        own = () if self.tolerance is None else ("float32", "compiled")
        return TOLERANCES | dict.fromkeys(own, self.tolerance)


class Through(nn.Module):
    """A core that is not called as `module(*inputs)`: `function(module, *inputs)`."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs):
        return self.function(self.module, *inputs)


def settled(module: nn.Module, *inputs: object) -> nn.Module:
    """In evaluation mode, its batch norms as after one batch: untrained ones let maps vanish."""
    norms = [layer for layer in module.modules() if hasattr(layer, "running_var")]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        module.train()(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return module.eval()


@dataclass
class Row:
    """What came out for one core."""

    name: str
    differences: dict[str, float] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    left_out: str = ""
    costs: Costs | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "; ".join(self.troubles) or "right"


# Registration


def load(folder: Path, slugs: Sequence[str] = ()) -> tuple[list[tuple[str, Core]], list[Row]]:
    """The registered cores with their slugs, and a row for each file that cannot be read."""
    files = {
        path.stem: path
        for path in sorted(folder.glob("*.py"))
        if path.stem != "device_check" and not path.stem.startswith(("test_", "conftest"))
    }
    if unknown := set(slugs) - set(files):
        raise ValueError(f"no cores are registered for {sorted(unknown)}; known: {list(files)}")
    cores, troubles = [], []
    for slug in slugs or files:
        try:
            spec = importlib.util.spec_from_file_location(f"device_cores_{slug}", files[slug])
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found = [(slug, core) for core in module.CORES]
            if not found:
                raise ValueError("CORES must hold at least one core, got none")
            cores += found
        except Exception as error:
            troubles.append(Row(slug, troubles=[f"cannot be read: {_told(error)}"]))
    return cores, troubles


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return plain_text(f"{type(error).__name__}: {lines[0][:200]}")


# One core


def _move(thing: object, device: torch.device) -> object:
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing).to(device)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, thing)


def _results(method: Callable, inputs: tuple, backward: bool, autocast=None) -> dict[str, Tensor]:
    """Outputs by name, and with `backward` the gradients of a weighted sum of them."""
    context = contextlib.nullcontext() if autocast is None else autocast
    with torch.set_grad_enabled(backward):
        leaves = {}
        if backward:
            inputs = tree_map(_as_leaf, inputs)
            given = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
            leaves = {f"gradient of input {i}": x for i, x in enumerate(given)}
        if backward and isinstance(method, nn.Module):
            named = method.named_parameters()
            leaves |= {f"gradient of {name}": p for name, p in named if p.requires_grad}
        with context:
            outputs = method(*inputs)
        outputs = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
        if backward:
            total = sum(_weighted(x) for x in outputs if x.requires_grad)
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            named = zip(leaves, gradients, strict=True)
            results |= {name: grad for name, grad in named if grad is not None}
    return results


def _as_leaf(x: object) -> object:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


def _weighted(x: Tensor) -> Tensor:
    """A sum that no normalisation turns into a constant, and that cancels in no gradient."""
    weights = 1 + torch.arange(x.numel(), device=x.device).cos()
    # Divided as a loss scaler would: neither sums nor single gradients leave float16's range.
    return (x.float() * weights.view(x.shape)).sum() / max(1, x.numel()) ** 0.5


def compare(ours: dict, reference: dict, rounded: bool = False) -> tuple[float, str]:
    """How far results are from a reference, relative to it, and which is farthest.

    The largest difference over the largest value, and whole numbers must be equal. Where half
    precision rounded, a single number may jump (a ReLU that flips): there it is the norm of the
    difference over the norm, of all outputs and of the whole gradient, and whole numbers are not
    compared. Raises AssertionError for another shape or set of results, and for what is not
    finite. Gradients count a fifth.
    """
    assert ours.keys() == reference.keys(), f"results are {list(ours)}, not {list(reference)}"
    pairs = {}
    for name, value in reference.items():
        own = ours[name].to(value.device)
        assert own.shape == value.shape, f"{name} has shape {own.shape}, not {value.shape}"
        if not value.is_floating_point():
            assert rounded or torch.equal(own, value), f"{name} is not the same"
            continue
        own, value, finite = own.double(), value.double(), value.isfinite()
        same = torch.equal(own.isfinite(), finite)
        same = same and torch.allclose(own[~finite], value[~finite], equal_nan=True)
        assert same, f"{name} is not finite where it should be"
        if finite.any():
            pairs[name] = own[finite], value[finite]
    errors = _by_norm(pairs) if rounded else _by_largest(pairs)
    for name in errors:
        errors[name] /= GRADIENTS if name.startswith("gradient") else 1
    return max(((error, name) for name, error in errors.items()), default=(0.0, ""))


def _by_largest(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    largest = {name: value.abs().max().item() for name, (_, value) in pairs.items()}
    errors = {}
    for name, (own, value) in pairs.items():
        # A gradient that is zero but for rounding is held against the largest of them all.
        kind = name.split()[0]
        floor = 1e-3 * max(size for other, size in largest.items() if other.startswith(kind))
        errors[name] = (own - value).abs().max().item() / max(largest[name], floor, 1e-30)
    return errors


def _by_norm(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    errors = {}
    for kind in ("output", "gradient"):
        of_kind = [pair for name, pair in pairs.items() if name.startswith(kind)]
        if of_kind:
            own, value = (torch.cat(side) for side in zip(*of_kind, strict=True))
            errors[kind] = ((own - value).norm() / value.norm().clamp(min=1e-30)).item()
    return errors


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, so that a difference to the CPU is a fault."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def check(core: Core, device: torch.device, backend: str, min_seconds: float = 0.1) -> Row:
    """All checks of one core, each on its own: a trouble is a sentence of the row."""
    row, start = Row(core.name, left_out=core.reason), time.monotonic()

    @contextlib.contextmanager
    def stage(name):
        try:
            yield
        except Exception as error:
            row.troubles.append(f"{name}: {_told(error)}")

    def hold(name, ours, reference):
        worst, where = compare(ours, reference, rounded=name in ("float16", "bfloat16"))
        row.differences[name], limit = worst, core.tolerances[name]
        assert worst <= limit, f"{where} is off by {worst:.1e}, beyond {limit:.0e}"

    torch.manual_seed(0)
    on_cpu = inputs = method = moved = compiled = None
    with stage("CPU"):
        built, inputs = core.build(), core.inputs()
        on_cpu = _results(built, inputs, core.backward)
    if on_cpu is None:
        return row
    with stage("float32"), _full_precision():
        method, moved = _move(built, device), _move(inputs, device)
        eager = _results(method, moved, core.backward)
        hold("float32", eager, on_cpu)
    for dtype in (torch.float16, torch.bfloat16) if core.autocast and moved is not None else ():
        name = str(dtype).removeprefix("torch.")
        with stage(name), _full_precision():
            autocast = torch.autocast(device.type, dtype)
            half = _results(method, moved, core.backward, autocast)
            hold(name, half, on_cpu)
    if core.compile and moved is not None:
        with stage("compiled"), _full_precision():
            torch.compiler.reset()
            compiled = torch.compile(method, fullgraph=True, backend=backend)
            whole = _results(compiled, moved, core.backward)
            hold("compiled", _uncompiled(whole), on_cpu)
    if moved is not None:
        with stage("costs"):
            methods = {"plain": core.plain(method)} if core.plain else {}
            methods["ours"] = method
            if compiled is not None and "compiled" in row.differences and backend == "inductor":
                methods["compiled"] = compiled
            if core.backward:
                moved = tree_map(_as_leaf, moved)
            costs = compare_costs(methods, *moved, backward=core.backward, min_seconds=min_seconds)
            row.costs = costs
    row.seconds = time.monotonic() - start
    return row


def _uncompiled(results: dict) -> dict:
    """A compiled module prefixes the names of its parameters."""
    return {name.replace("_orig_mod.", ""): value for name, value in results.items()}


# The table

HEADINGS = (
    "paper", "core", *TOLERANCES, "plain time", "our time", "compiled time", "plain / ours",
    "its quartiles", "plain memory", "our memory", "verdict",
)  # fmt: skip


def table(rows: Sequence[tuple[str, Row]]) -> Table:
    """One line a core."""
    lines = []
    for slug, row in rows:
        cells = {"paper": slug, "core": row.name, "verdict": row.verdict}
        cells |= {name: f"{value:.0e}" for name, value in row.differences.items()}
        for cost in row.costs or ():
            who = {"plain": "plain ", "ours": "our ", "compiled": "compiled "}[cost.name]
            cells[f"{who}time"] = readable(cost.seconds, "s")
            if cost.memory is not None:
                cells[f"{who}memory"] = readable(cost.memory, "B")
        if row.costs and row.costs[0].name == "plain":
            ratios = row.costs.ratios("plain", to="ours")
            low, _median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells["plain / ours"] = readable(statistics.median(ratios), digits=2)
            cells["its quartiles"] = f"{low:.2g} to {high:.2g}"
        if row.left_out:
            cells["verdict"] += f" (left out: {row.left_out})"
        lines.append(tuple(cells.get(heading, "-") for heading in HEADINGS))
    return Table(HEADINGS, lines)


def write(rows: Sequence[tuple[str, Row]], title: str, out: Path) -> None:
    """Markdown for a note, CSV for a program."""
    from tabulate import tabulate

    out.mkdir(parents=True, exist_ok=True)
    shown = table(rows)
    cells = [[str(cell).replace("|", "/") for cell in row] for row in shown.rows]
    text = tabulate(cells, shown.headings, "github", disable_numparse=True)
    (out / "table.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([shown.headings, *shown.rows])


def _title(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"Cores on {name}, PyTorch {torch.__version__}. Differences are relative to the CPU."


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help="papers to check (all)")
    parser.add_argument("--device", default="auto", help="auto (an accelerator), cpu, cuda:1, mps")
    parser.add_argument("--backend", help="of torch.compile (inductor; on a CPU aot_eager)")
    parser.add_argument("--minutes", type=float, default=5, help="no core starts after so many")
    parser.add_argument("--min-seconds", type=float, default=0.1, help="timed of each method")
    parser.add_argument("--folder", type=Path, default=HERE, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "gpu")
    options = parser.parse_args(arguments)
    try:
        device = pick_device(options.device)
        cores, troubles = load(options.folder, options.slugs)
    except ValueError as error:
        print(f"make gpu: {plain_text(error)}", file=sys.stderr)
        return 2
    if device.type == "cpu" and options.device == "auto":
        print("make gpu: there is no accelerator (CUDA or MPS) here, so nothing was checked")
        return 0
    backend = options.backend or ("aot_eager" if device.type == "cpu" else "inductor")
    start, rows = time.monotonic(), [(row.name, row) for row in troubles]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for slug, core in cores:
            if time.monotonic() - start > 60 * options.minutes:
                row = Row(core.name, troubles=[f"not run: {options.minutes:g} minutes are over"])
            else:
                row = check(core, device, backend, options.min_seconds)
            rows.append((slug, row))
            print(f"{row.seconds:6.1f} s  {slug}: {core.name}: {row.verdict}", flush=True)
            write(rows, _title(device), options.out)
    print()
    print(table(rows))
    failed = sum(bool(row.troubles) for _, row in rows)
    minutes = math.ceil((time.monotonic() - start) / 6) / 10
    print(f"\n{len(rows) - failed} of {len(rows)} cores are right, after {minutes:g} minutes.")
    return 1 if failed else 0


if __name__ == "__main__":
    # Registered files import this module by its name: run that one, not a second copy.
    from device_check import main as run

    sys.exit(run())
