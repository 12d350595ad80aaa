"""Scatterbrain's two attentions on an accelerator, beside the whole table."""

import torch
from device_check import Core
from torch.nn import functional as F

from shuffle_nb.kernels.scatterbrain import ScatterbrainLocalAttention, ScatterbrainLSHAttention


def generator():
    return torch.Generator().manual_seed(0)


def exact(core):
    """Softmax attention of the same shapes: what both stand for."""

    def attend(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2)

    return attend


CORES = [
    Core(
        "Scatterbrain, window of 64, 4,096 tokens",
        build=lambda: ScatterbrainLocalAttention(32, 64, 32, generator=generator()),
        inputs=lambda: tuple(torch.randn(3, 2, 4096, 4, 32).unbind()),
        plain=exact,
        backward=True,
    ),
    Core(
        # Two equal projections may be sorted otherwise there: few, and far apart, positions.
        "Scatterbrain, four hashes, 1,024 tokens",
        build=lambda: ScatterbrainLSHAttention(32, 4, 16, 32, generator=generator()),
        inputs=lambda: tuple(torch.randn(3, 2, 1024, 4, 32).unbind()),
        plain=exact,
        backward=True,
        tolerance=2e-2,
    ),
]
