"""The random-feature layers on an accelerator, beside dense layers of their width."""

import torch
from device_check import Core
from torch import nn

from shuffle_nb.kernels.snnk import SNNKAdapter, SNNKLinear, UniversalRandomFeatures


def dense(width):
    """A plain layer of the same width with a ReLU: what the random features stand for."""

    def layer(core):
        device = next(core.parameters()).device
        return nn.Sequential(nn.Linear(width, width), nn.ReLU()).to(device)

    return layer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class KernelEstimate(nn.Module):
    """E[phi(x) . psi(w, b)] from draws: an estimate of cos(w . x + b)."""

    def __init__(self):
        super().__init__()
        self.maps = UniversalRandomFeatures(256, 512, generator=generator())
        self.w = nn.Parameter(torch.randn(256, 256, generator=generator(1)) / 16)
        self.b = nn.Parameter(torch.zeros(256))

    def forward(self, x):
        return self.maps.phi(x) @ self.maps.psi(self.w, self.b).T


CORES = [
    Core(
        "SNNK layer, 1,024 wide, 128 features",
        build=lambda: SNNKLinear(1024, 1024, 128, generator=generator()),
        inputs=lambda: (torch.randn(4096, 1024),),
        plain=dense(1024),
        backward=True,
    ),
    Core(
        "SNNK adapter",
        build=lambda: SNNKAdapter(1024, 64, bottleneck=32, generator=generator()),
        inputs=lambda: (torch.randn(4096, 1024),),
        backward=True,
    ),
    Core(
        "universal random features of cos",
        build=KernelEstimate,
        inputs=lambda: (torch.randn(1024, 256) / 16,),
        plain=lambda core: lambda x: torch.cos(x @ core.w.T + core.b),
        backward=True,
    ),
]
