"""Conditions, bent masks and the short chain on an accelerator."""

import torch
from device_check import Core, Through
from torch import nn

from shuffle_nb.diffusion.reface import (
    ConditionMixer,
    OneTokenMapper,
    ddim_chain,
    scaled_linear_schedule,
    tps_warp_mask,
)


class Denoiser(nn.Module):
    """A small stand-in for a denoiser of latents: the chain is what is tested."""

    def __init__(self):
        super().__init__()
        self.register_buffer("alphas_cumprod", scaled_linear_schedule())
        self.layers = nn.Sequential(nn.Conv2d(9, 64, 3, padding=1), nn.SiLU())
        self.out, self.cond = nn.Conv2d(64, 4, 3, padding=1), nn.Linear(768, 64)

    def forward(self, z, t, cond):
        return self.out(self.layers(z) + self.cond(cond)[:, :, None, None])


def mixer():
    torch.manual_seed(0)
    return ConditionMixer(1024, 512, 136, 768, mapper=OneTokenMapper(1024, depth=2)).eval()


def chain(model, z, extra, cond):
    return ddim_chain(model, z, extra, cond, steps=4)


CORES = [
    Core(
        "condition mixer",
        build=mixer,
        inputs=lambda: (
            torch.randn(64, 1024), torch.randn(64, 1024), torch.randn(64, 512), torch.randn(64, 136)
        ),
        backward=True,
    ),
    Core(
        "masks bent by a spline",
        build=lambda: tps_warp_mask,
        inputs=lambda: ((torch.rand(16, 1, 128, 128) < 0.5).float(), 0.2 * torch.randn(16, 2)),
        # A mask is 0 or 1, so a grid that is off by the rounding of 16 bits is off by much.
        tolerance={"float32": 1e-3, "compiled": 1e-3, "float16": 1.0, "bfloat16": 1.0},
    ),
    Core(
        "chain of four steps",
        build=lambda: Through(Denoiser(), chain),
        inputs=lambda: (
            torch.randn(8, 4, 32, 32), torch.rand(8, 5, 32, 32), torch.randn(8, 768)
        ),
        backward=True,
    ),
]  # fmt: skip
