"""DenseShift's weights and its exponent addition on an accelerator."""

import torch
from device_check import Core, Through
from torch import nn

from shuffle_nb.mobile.dense_shift import (
    DenseShiftConv2d,
    DenseShiftLinear,
    shift_multiply,
    weight_as_written,
)


def latents_of(layer):
    return layer.w_sign, layer.scales


def convolution_as_written(core):
    """The same convolution, its weights by autograd through the formula."""
    return lambda x: nn.functional.conv2d(x, weight_as_written(*latents_of(core)), padding=1)


def linear_as_written(core):
    """The same layer, its weights by autograd through the formula."""
    return lambda x: nn.functional.linear(x, weight_as_written(*latents_of(core)))


def by_addition(layer, x):
    """Multiply each input by each weight of its column, without a multiplication."""
    return shift_multiply(x.float(), layer.shift(), layer.sign())


CORES = [
    Core(
        "DenseShift convolution, 3 bits",
        build=lambda: DenseShiftConv2d(64, 128, 3, padding=1),
        inputs=lambda: (torch.randn(16, 64, 28, 28),),
        plain=convolution_as_written,
        backward=True,
    ),
    Core(
        "DenseShift linear layer, 4 bits",
        build=lambda: DenseShiftLinear(1024, 1024, bits=4),
        inputs=lambda: (torch.randn(256, 1024),),
        plain=linear_as_written,
        backward=True,
    ),
    Core(
        "exponent addition",
        build=lambda: Through(DenseShiftLinear(1024, 1024), by_addition),
        inputs=lambda: (torch.randn(1024, 1024),),
        plain=lambda core: lambda x: x * core.module.weight,
        tolerance=0.0,
    ),
]
