"""ARM-Net's exponential neurons on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.click_through.arm_net import ARMModule, entmax_by_halving


def as_written(core):
    """Scores in the order of the formula, and fifty halvings for each gate."""

    def neurons(e):
        attention = core.attention
        scores = torch.einsum("bfx,kxy,koy->bkof", e, attention.bilinear, attention.query)
        scores = scores.to(e.dtype) / attention.query.shape[-1] ** 0.5
        weights = entmax_by_halving(scores, attention.alpha) * attention.values
        return torch.exp(torch.einsum("bkof,bfe->bkoe", weights.to(e.dtype), e)).flatten(1, 2)

    return neurons


CORES = [
    Core(
        "ARM-Net, exponential neurons",
        build=lambda: ARMModule(39, 10, heads=4, neurons=64),
        inputs=lambda: (0.3 * torch.randn(1024, 39, 10),),
        plain=as_written,
        backward=True,
    ),
]
