"""The two small diffusion models on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.diffusion.tiny_diffusion import load_tiny_dit, load_tiny_edm

CORES = [
    Core(
        "tiny EDM, 64 digits",
        build=lambda: load_tiny_edm(16),
        inputs=lambda: (torch.randn(64, 1, 8, 8), torch.linspace(0.02, 20, 64)),
    ),
    Core(
        "tiny DiT, 64 digits",
        build=load_tiny_dit,
        inputs=lambda: (torch.randn(64, 1, 8, 8), torch.linspace(0.01, 0.99, 64)),
    ),
]
