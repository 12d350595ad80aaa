"""Correlations of units, and the small net, on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.features.convergent_learning import small_cnn, unit_correlation


def plain_correlation(core):
    """Standardise both by sample, then multiply."""

    def correlate(x, y):
        x, y = (z.float().movedim(1, -1).flatten(0, 2) for z in (x, y))
        x, y = ((z - z.mean(0)) / z.std(0, correction=0) for z in (x, y))
        return x.T @ y / len(x)

    return correlate


CORES = [
    Core(
        "unit correlation, maps of 96 channels",
        build=lambda: unit_correlation,
        inputs=lambda: tuple(torch.randn(64, 96, 27, 27).relu() for _ in range(2)),
        plain=plain_correlation,
        backward=True,
    ),
    Core(
        "network of the lesson, on colour images",
        build=lambda: small_cnn(3, 32, widths=(32, 64, 128), hidden=256).eval(),
        inputs=lambda: (torch.randn(256, 3, 32, 32),),
        backward=True,
    ),
]
