"""Coordinate attention on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.mobile.coordinate_attention import CoordinateAttention, gates_as_written


def as_written(core):
    """The formula with pooling layers, convolutions and two products."""

    def output(x):
        g_h, g_w = gates_as_written(core, x)
        return x * g_w * g_h

    return output


CORES = [
    Core(
        "coordinate attention",
        build=lambda: CoordinateAttention(96).eval(),
        inputs=lambda: (torch.randn(32, 96, 56, 56),),
        plain=as_written,
        backward=True,
    )
]
