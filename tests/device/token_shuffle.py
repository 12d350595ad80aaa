"""Token-Shuffle on an accelerator, beside the model that reads token after token."""

import torch
from device_check import Core

from shuffle_nb.shuffles.token_shuffle import TokenShuffleAR


def model(window):
    return TokenShuffleAR(1024, 256, 4, 8, (32, 32), window=window, num_classes=10).eval()


def without_windows(core):
    """The same Transformer on all 1,024 tokens."""
    return model(window=1).to(core.head.weight.device)


CORES = [
    Core(
        "Token-Shuffle model, windows of 2 x 2",
        build=lambda: model(window=2),
        inputs=lambda: (torch.randint(1024, (4, 1024)), torch.arange(4)),
        plain=without_windows,
        backward=True,
    )
]
