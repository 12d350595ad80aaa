"""Costs: counted FLOPs, memory and parameters are exact; times are taken in turn."""

import functools
import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from shuffle_nb.foundations import costs as module
from shuffle_nb.foundations.costs import (
    Cost,
    Costs,
    compare_costs,
    costs_by_size,
    count_flops,
    count_parameters,
    peak_memory,
    take_turns,
    time_block,
)

CPU = torch.device("cpu")
quick = functools.partial(compare_costs, rounds=3, min_seconds=0.001)


# FLOPs


def test_flops_of_products_convolutions_and_attention_on_a_cpu():
    assert count_flops(torch.matmul, torch.randn(3, 4), torch.randn(4, 5)) == 2 * 3 * 4 * 5
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert count_flops(convolution, torch.randn(2, 3, 10, 12)) == 2 * 2 * 8 * 10 * 12 * 3 * 9
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    assert count_flops(scaled_dot_product_attention, q, k, v) == 2 * 2 * (2 * 4 * 6 * 6 * 8)


def test_flops_of_the_backward_pass():
    layer = nn.Linear(4, 5, bias=False)
    x = torch.randn(3, 4, requires_grad=True)
    assert count_flops(layer, x, backward=True) == 3 * count_flops(layer, x)
    q, k, v = torch.randn(3, 2, 4, 6, 8, requires_grad=True)
    forward = count_flops(scaled_dot_product_attention, q, k, v)
    assert count_flops(scaled_dot_product_attention, q, k, v, backward=True) > 3 * forward


LAYERS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
GEOMETRIES = [{}, {"stride": 2}, {"dilation": 2}, {"padding": 1, "stride": 3}]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("dimensions", "transposed"), LAYERS)
@pytest.mark.parametrize(("inside", "groups"), [(8, 1), (8, 4), (8, 8), (16, 8)])
def test_each_gradient_of_a_convolution_costs_its_forward_pass(
    inside, groups, dimensions, transposed, geometry, bias
):
    outside = 16
    layer = LAYERS[dimensions, transposed](inside, outside, 3, groups=groups, bias=bias, **geometry)
    x = torch.randn(2, inside, *[7, 6, 8][:dimensions])
    with torch.no_grad():
        places = (x if transposed else layer(x)).shape[2:].numel()
    forward = 2 * 2 * places * 3**dimensions * inside * outside // groups  # by hand
    assert count_flops(layer, x) == forward
    assert count_flops(layer, x, backward=True) == 2 * forward  # weight alone
    x.requires_grad_()
    assert count_flops(layer, x, backward=True) == 3 * forward
    layer.weight.requires_grad_(False)
    assert count_flops(layer, x, backward=True) == 2 * forward  # input alone
    if bias:  # a sum, no products
        assert count_flops(layer, x.detach(), backward=True) == forward


def test_the_gradients_of_a_grouped_convolution_are_the_products_that_a_loop_multiplies():
    """The formula against a loop over outputs that counts each product it needs."""
    layer = nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False)
    x = torch.randn(1, 4, 9, requires_grad=True)
    y = layer(x)
    y.backward(grad := torch.randn_like(y))
    products, of_x, of_weight = 0, torch.zeros_like(x), torch.zeros_like(layer.weight)
    for out, place, inside, tap in itertools.product(range(6), range(4), range(2), range(3)):
        channel, position = inside + 2 * (out // 3), 2 * place + tap
        of_x[0, channel, position] += grad[0, out, place] * layer.weight[out, inside, tap]
        of_weight[out, inside, tap] += grad[0, out, place] * x[0, channel, position]
        products += 2
    torch.testing.assert_close(of_x, x.grad)
    torch.testing.assert_close(of_weight, layer.weight.grad)
    flops = count_flops(layer, x, backward=True) - count_flops(layer, x)
    assert flops == 2 * products


# Memory


def test_peak_memory_follows_the_life_of_tensors():
    x = torch.randn(1000)
    one = 4 * 1000

    def two_at_once(x):
        return (x + 1) * 2  # the sum lives until the product is made

    def chain(x):
        for _ in range(5):
            x = x + 1
        return x

    assert peak_memory(torch.neg, x) == one
    assert peak_memory(two_at_once, x) == 2 * one
    assert peak_memory(chain, x) == 2 * one
    assert peak_memory(lambda x: x[::2].view(-1, 2), x) == 0  # views
    assert peak_memory(lambda x: (x + 1).add_(1)[:10], x) == one  # in place, then a view
    assert peak_memory(lambda x: x, x) == 0 == peak_memory(lambda x: x.add_(1), x)


@pytest.mark.parametrize(
    "method",
    [
        lambda x: np.sort(x.numpy()),
        lambda x: torch.from_numpy(np.sort(x.numpy())),
        lambda x: sum(range(10)),
    ],
)
def test_what_pytorch_does_not_allocate_is_not_tracked(method):
    assert peak_memory(method, torch.randn(100)) is None


def test_backward_holds_more_than_forward():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)])
    x = torch.randn(128, 64)
    assert peak_memory(model, x, backward=True) > 1.5 * peak_memory(model, x)


def test_peak_memory_of_a_second_backward_pass_is_that_of_the_first():
    """Gradients that are there already would hide what they take."""
    model, x = nn.Linear(512, 512), torch.randn(2, 512)
    first = peak_memory(model, x, backward=True)
    model(x).sum().backward()
    assert peak_memory(model, x, backward=True) == first >= 4 * 512 * 512


# Parameters

LAYER = nn.Linear(3, 2)  # 8 numbers
SHARED = {"one": nn.Linear(2, 2), "two": nn.Linear(2, 3)}  # 6 and 9


class Sampler:
    def __init__(self, model):
        self.model = model

    def draw(self, x):
        return self.model(x)


def captured(*held):
    return lambda x: held and x


def through_a_helper(x):
    return named_layer(x)


def named_layer(x):
    return LAYER(x)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LAYER, (8, 0)),
        (LAYER.forward, (8, 0)),
        (LAYER.weight.matmul, (6, 0)),
        (functools.partial(torch.add, LAYER.weight), (6, 0)),
        (functools.partial(captured(), model=[LAYER]), (8, 0)),
        (captured(LAYER, LAYER), (8, 0)),
        (captured(nn.Sequential(LAYER, LAYER), LAYER.weight), (8, 0)),
        (captured(SHARED), (15, 0)),
        (captured([SHARED, (LAYER,)]), (23, 0)),
        (lambda x, model=LAYER: model(x), (8, 0)),
        (named_layer, (8, 0)),
        (through_a_helper, (8, 0)),
        (lambda x: [LAYER(row) for row in x], (8, 0)),
        (functools.wraps(torch.add)(captured(LAYER)), (8, 0)),
        (Sampler(LAYER).draw, (8, 0)),
        (captured(nn.Linear(3, 2).requires_grad_(False), LAYER), (8, 8)),
        (torch.compile(LAYER), (8, 0)),
        (torch.compile(captured(LAYER)), (8, 0)),
        (torch.matmul, (0, 0)),
        (captured(torch.randn(3)), (0, 0)),
    ],
    ids=range(20),
)
def test_parameters_are_found_wherever_a_method_holds_them(method, expected):
    assert count_parameters(method) == expected


def test_of_a_captured_dictionary_a_comparison_counts_the_model_that_is_called():
    costs = quick({name: lambda x, n=name: SHARED[n](x) for name in SHARED}, torch.randn(4, 2))
    assert [row.trainable for row in costs] == [6, 9]


def test_a_function_that_reads_itself_ends():
    def again(x):
        return again

    assert count_parameters(again) == (0, 0)


# Time


class SlowingMachine:
    """A processor clock on which every call takes longer than the one before."""

    def __init__(self):
        self.calls, self.now = 100, 0.0

    def process_time(self):
        return self.now

    def call(self):
        self.calls += 1
        self.now += self.calls


def test_taking_turns_sees_through_a_machine_that_slows_down(monkeypatch):
    machine = SlowingMachine()
    monkeypatch.setattr("time.process_time", machine.process_time)
    after = [time_block(machine.call, 60, CPU) for _ in range(2)]
    machine.calls = 100
    both = take_turns({"a": machine.call, "b": machine.call}, {"a": 6, "b": 6}, 10, CPU)
    ratios = np.divide(both["b"], both["a"])
    assert after[1] / after[0] > 1.3  # the same function, and yet
    assert 0.99 < np.median(ratios) < 1.01
    assert (ratios[::2] > 1).all() and (ratios[1::2] < 1).all()  # the order alternates


def test_each_round_gives_every_method_a_turn_and_every_second_goes_backwards():
    seen = []
    calls = {name: functools.partial(seen.append, name) for name in "abc"}
    taken = take_turns(calls, {"a": 2, "b": 1, "c": 1}, 3, CPU)
    assert "".join(seen) == "aabc" + "cbaa" + "aabc"
    assert {name: len(each) for name, each in taken.items()} == {"a": 3, "b": 3, "c": 3}


def test_waiting_costs_no_processor_time_and_does_not_hang_the_comparison():
    begin = time.monotonic()
    costs = quick({"waits": lambda: time.sleep(0.02)})
    assert costs.of("waits").seconds < 0.01
    assert time.monotonic() - begin < 60


def test_an_accelerator_is_asked_by_events_that_its_queue_has_reached(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            log.append("elapsed")
            return 30.0  # milliseconds

    monkeypatch.setattr(torch.mps, "Event", Event, raising=False)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: log.append("wait"))
    seconds = time_block(lambda: log.append("call"), 3, torch.device("mps"))
    assert seconds == pytest.approx(0.01)
    assert log == ["wait", "record", *["call"] * 3, "record", "wait", "elapsed"]


def test_a_block_fills_its_time_and_the_number_of_calls_is_told():
    fast, slow = quick(
        {"fast": lambda x: x[0], "slow": lambda x: x @ x}, torch.randn(300, 300), min_seconds=0.03
    )
    assert fast.calls > slow.calls >= 3
    assert fast.calls * fast.seconds > 0.02
    assert fast.calls % 3 == 0 and len(fast.rounds) == 3


def test_a_comparison_leaves_the_world_as_it_was():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    layer.weight.grad = before = torch.ones(4, 4)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    quick({"noisy": lambda x: layer(x) + torch.randn(4)}, x, backward=True)
    assert layer.weight.grad is before and layer.bias.grad is None and x.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    quick({"layer": layer}, x)
    assert layer.bias.grad is None


# The comparison


def test_comparison_has_a_row_a_method_and_ratios_pair_by_pair():
    costs = compare_costs(
        {"small": nn.Linear(32, 8), "large": nn.Linear(32, 2048)},
        torch.randn(256, 32),
        min_seconds=0.01,
    )
    small, large = costs
    assert small.trainable == small.parameters == 33 * 8 and large.flops == 2 * 256 * 32 * 2048
    assert large.seconds > small.seconds
    assert costs.of("large") is large
    assert len(small.rounds) == 9 and small.quartiles[0] <= small.seconds <= small.quartiles[1]
    ratios = costs.ratios("large", to="small")
    assert ratios == tuple(a / b for a, b in zip(large.rounds, small.rounds, strict=True))
    assert min(ratios) > 1 and costs.ratios("small", to="small") == (1,) * 9
    table = costs._repr_html_()
    assert table.count("<tr>") == 3 and "67,584" in table and "processor time" in table
    assert "small" in str(costs) and repr(costs) == str(costs)


def test_columns_that_say_nothing_are_left_out():
    def headings(costs):
        return list(costs.table.headings)

    nothing = quick({"a": lambda x: x, "b": lambda x: x}, torch.randn(3))
    assert headings(nothing) == [
        "method", "processor time", "quartiles", "calls", "ratio to the first", "its quartiles",
    ]  # fmt: skip
    alone = quick({"layer": LAYER.requires_grad_(False)}, torch.randn(5, 3))
    LAYER.requires_grad_(True)
    assert headings(alone) == [
        "method", "frozen", "FLOPs", "peak memory", "processor time", "quartiles", "calls",
    ]  # fmt: skip
    mixed = quick({"torch": torch.neg, "NumPy": lambda x: np.negative(x.numpy())}, torch.randn(3))
    place = headings(mixed).index("peak memory")
    assert [row[place] for row in mixed.table.rows] == ["12 B", "-"]


def test_times_of_a_gpu_are_called_so():
    rows = (Cost("a", (1.0, 2.0), clock="GPU time"), Cost("b", (1.0, 2.0), clock="GPU time"))
    assert "GPU time" in str(Costs(rows)) and "processor" not in str(Costs(rows))


def test_growth_has_a_row_a_size_and_method():
    def build(size):
        x = torch.randn(size, size)
        return {"product": torch.matmul, "sum": torch.add}, (x, x)

    growth = costs_by_size(build, [4, 8], size_name="n", rounds=3, min_seconds=0.001)
    assert [(row.size, row.name) for row in growth] == [
        (4, "product"), (4, "sum"), (8, "product"), (8, "sum"),
    ]  # fmt: skip
    assert growth.of("product", 8).flops == 8 * growth.of("product", 4).flops
    assert str(growth).splitlines()[0].split()[0] == "n"
    assert len(growth.ratios("product", to="sum", size=8)) == 3
    assert growth.slope("product", "flops") == pytest.approx(3)
    assert growth.slope("sum", "memory") == pytest.approx(2)


def test_slope_is_the_power_of_the_growth():
    rows = tuple(Cost("m", (0.1 * size**1.5,) * 3, size=size) for size in (2, 5, 9))
    assert Costs(rows).slope("m") == pytest.approx(1.5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_method_is_counted_like_its_source(fullgraph, backward):
    torch.compiler.reset()
    compiled = torch.compile(LAYER, backend="aot_eager", fullgraph=fullgraph)
    methods, x = {"plain": LAYER, "compiled": compiled}, torch.randn(5, 3)
    plain, fast = quick(methods, x, backward=backward)
    assert (fast.trainable, fast.flops, fast.memory) == (plain.trainable, plain.flops, plain.memory)
    assert peak_memory(compiled, x) == 5 * 2 * 4 and count_flops(compiled, x) == 2 * 5 * 2 * 3


# Bad input


def broken(x):
    raise RuntimeError("no luck")


def growth_of(method):
    return lambda: costs_by_size(
        lambda size: ({"ours": torch.neg, "theirs": method}, (torch.ones(size),)),
        [16, 64],
        rounds=3,
        min_seconds=0.001,
    )


two_sizes = Costs((Cost("a", (1.0,) * 3, size=1, run=1), Cost("a", (1.0,) * 3, size=2, run=2)))
two_runs = Costs((Cost("a", (1.0,) * 3, run=1), Cost("b", (1.0,) * 3, run=2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quick({}), "methods must be a dict with at least one method, got {}"),
        (lambda: quick(torch.neg, torch.ones(1)), "methods must be a dict.*got <built-in"),
        (lambda: quick({"a": 3}), "method 'a' must be callable, got int"),
        (lambda: quick({"a": torch.neg}, torch.ones(1), rounds=2), "rounds must be.*3, got 2"),
        (lambda: quick({"a": torch.neg}, torch.ones(1), rounds=True), "rounds must be.*got True"),
        (lambda: quick({"a": torch.neg}, torch.ones(1), rounds=9.0), "rounds must be.*got 9.0"),
        (lambda: quick({"a": torch.neg}, torch.ones(1), min_seconds=0), "min_seconds.*got 0"),
        (lambda: quick({"a": broken}, 1), "method 'a' raises: RuntimeError: no luck"),
        (growth_of(broken), "method 'theirs' raises at size 16: RuntimeError: no luck"),
        (
            growth_of(lambda x: broken(x) if len(x) > 16 else x),
            "method 'theirs' raises at size 64: RuntimeError: no luck",
        ),
        (
            lambda: quick({"a": torch.neg}, torch.ones(1), backward=True),
            "method 'a' raises: ValueError: backward=True needs an output",
        ),
        (lambda: costs_by_size(lambda size: ({}, ()), []), "sizes must hold at least one"),
        (lambda: costs_by_size(lambda size: ({}, ()), [1]), "methods must be a dict"),
        (lambda: costs_by_size(lambda size: torch.neg, [1]), "build must return.*got"),
        (lambda: count_flops("a"), "method must be callable, got str"),
        (lambda: peak_memory(None), "method must be callable, got NoneType"),
        (lambda: two_sizes.of("b"), r"no cost of 'b'; methods: \['a'\]; sizes: \[1, 2\]"),
        (lambda: two_sizes.of("a", 3), "no cost of 'a' at size 3"),
        (lambda: two_sizes.ratios("a", to="a"), "size must be"),
        (lambda: two_runs.ratios("a", to="b"), "not measured in turn"),
        (lambda: two_runs.slope("a"), "needs two sizes, got 0"),
        (lambda: two_sizes.slope("a", "flops"), "flops of 'a' must be above zero"),
        (lambda: two_sizes.slope("a", "memory"), "memory of 'a' must be above zero"),
    ],
    ids=range(23),
)
def test_bad_input(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_module_adds_a_moment_to_the_import_of_torch():
    code = """
import time, torch
start = time.process_time()
import shuffle_nb.foundations.costs
print(time.process_time() - start)
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)]
    if float(runs[0].stdout) > 0.05:  # once more: the first may have compiled the files
        runs.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True))
    assert min(float(run.stdout) for run in runs) < 0.05, runs[-1].stderr
    assert not hasattr(module, "Timer")
