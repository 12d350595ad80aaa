"""The selective scan and the bidirectional mixer, on an accelerator."""

import torch
import torch.nn.functional as F
from device_check import Core

from shuffle_nb.shuffles.layer_shuffle import BiMamba, ShuffleMamba
from shuffle_nb.shuffles.selective_scan import selective_scan


class Scan(torch.nn.Module):
    """The scan with rates of its own."""

    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(256, 16))

    def forward(self, u, delta, B, C):
        return selective_scan(u, F.softplus(delta - 2), self.A, B, C)


def scan_inputs():
    return (*torch.randn(2, 4, 256, 300), *torch.randn(2, 4, 16, 300))


def with_the_loop(core):
    """The recurrence, token after token."""
    return lambda u, delta, B, C: selective_scan(
        u, F.softplus(delta - 2), core.A, B, C, method="loop"
    )


CORES = [
    Core(
        "selective scan", build=Scan, inputs=scan_inputs, plain=with_the_loop,
        backward=True, tolerance=1e-4,
    ),
    Core(
        "bidirectional mixer", build=lambda: BiMamba(128).eval(),
        inputs=lambda: (torch.randn(4, 197, 128),), backward=True, tolerance=1e-4,
    ),
    Core(
        "ShuffleMamba", build=lambda: ShuffleMamba(64, 16, 4, 96, num_classes=10).eval(),
        inputs=lambda: (torch.rand(4, 3, 64, 64),), backward=True, tolerance=1e-4,
    ),
]  # fmt: skip
