"""REFace on an accelerator: its differentiable chain, against the bare loop, and bent masks."""

import torch
from device_check import Core
from torch import nn

from shuffle_nb.diffusion.reface import ddim_chain, ddim_coefficients, tps_warp_mask
from shuffle_nb.diffusion.tiny_diffusion import ddim_step, scaled_linear_schedule


class Chain(nn.Module):
    """Four steps through a small convolution: noise and what stays -> four estimates."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.register_buffer("alphas_cumprod", scaled_linear_schedule())
        for name, column in zip(
            ("times", "now", "then"), ddim_coefficients(self.alphas_cumprod, 4, 999), strict=True
        ):
            self.register_buffer(name, column)
        self.net = nn.Sequential(
            nn.Conv2d(2 * channels + 1, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, channels, 3, padding=1),
        )

    def predict(self, z9, t, c):
        return self.net(z9)

    def forward(self, z, extra):
        table = (self.times, self.now, self.then)
        return ddim_chain(self.predict, z, extra, None, 4, table=table)


def plain(core):
    def estimates(z, extra):
        found = []
        for now, then in zip(core.now, core.then, strict=True):
            z, estimate = ddim_step(z, core.net(torch.cat([z, extra], 1)), now, then)
            found.append(estimate)
        return torch.stack(found)

    return estimates


CORES = [
    Core(
        "REFace chain, 4 steps, 8 latents of 64 x 64",
        build=lambda: Chain().eval(),
        inputs=lambda: (torch.randn(8, 4, 64, 64), torch.randn(8, 5, 64, 64)),
        plain=plain,
        backward=True,
        tolerance=1e-2,  # the first step divides by the root of abar = 0.005
    ),
    Core(
        "REFace masks, 64 of 256 x 256, bent",
        build=lambda: tps_warp_mask,
        inputs=lambda: (torch.rand(64, 1, 256, 256), torch.rand(64, 2) - 0.5),
    ),
]
