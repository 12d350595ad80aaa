"""The tied autoencoder on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.features.bows import TiedAutoencoder


def as_written(core):
    """The formula, with the matrix W^T W."""
    return lambda x: (x @ (core.weight.T @ core.weight) + core.bias).relu()


CORES = [
    Core(
        "tied autoencoder, 4,000 words through 256",
        build=lambda: TiedAutoencoder(4000, 256),
        inputs=lambda: ((torch.rand(512, 4000) < 0.05).float(),),
        plain=as_written,
        backward=True,
    )
]
