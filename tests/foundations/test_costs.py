"""Costs: counted FLOPs and memory are exact, times are ordered, tables show themselves."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from shuffle_nb.foundations.costs import (
    compare_costs,
    costs_by_size,
    count_flops,
    peak_memory,
)


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


def test_backward_holds_more_than_forward():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)])
    x = torch.randn(128, 64)
    assert peak_memory(model, x, backward=True) > 1.5 * peak_memory(model, x)


def test_comparison_has_a_row_a_method_relative_to_the_first():
    costs = compare_costs(
        {"small": nn.Linear(32, 8), "large": nn.Linear(32, 2048)},
        torch.randn(256, 32),
        min_seconds=0.01,
    )
    small, large = costs
    assert small.parameters == 33 * 8 and large.flops == 2 * 256 * 32 * 2048
    assert small.ratio == 1 and large.ratio == pytest.approx(large.seconds / small.seconds)
    assert large.seconds > small.seconds
    assert costs.of("large") is large
    table = costs._repr_html_()
    assert table.count("<tr>") == 3 and "67,584" in table
    assert "small" in str(costs) and repr(costs) == str(costs)


def test_methods_need_no_gradients_left_behind():
    layer = nn.Linear(4, 4)
    compare_costs({"layer": layer}, torch.randn(2, 4), min_seconds=0.001)
    assert layer.weight.grad is None


def test_growth_has_a_row_a_size_and_method():
    def build(size):
        x = torch.randn(size, size)
        return {"product": torch.matmul, "sum": torch.add}, (x, x)

    growth = costs_by_size(build, [4, 8], size_name="n", min_seconds=0.001)
    assert [(row.size, row.name) for row in growth] == [
        (4, "product"), (4, "sum"), (8, "product"), (8, "sum"),
    ]  # fmt: skip
    assert growth.of("product", 8).flops == 8 * growth.of("product", 4).flops
    assert str(growth).splitlines()[0].split()[0] == "n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_costs({}), "at least one method"),
        (
            lambda: compare_costs({"a": torch.neg}, torch.ones(1), min_seconds=0.001).of("b"),
            r"no cost of 'b'.*\['a'\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
