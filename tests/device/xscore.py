"""xScore of many models, and a network of its zoo, on an accelerator."""

import torch
from device_check import Core, settled
from torch import nn

from shuffle_nb.mobile.micro_zoo import micro_zoo
from shuffle_nb.mobile.xscore import xscore


class Scores(nn.Module):
    """xScore with a weight for each data set, so that there is something to learn."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(0.5, 1, 32))

    def forward(self, acc):
        return xscore(acc * self.weights)


def by_moments(core):
    """Mean of squares minus square of the mean."""

    def scores(acc):
        weighted = acc * core.weights
        relative = weighted / weighted.max(0).values
        mean = relative.mean(1)
        return mean - ((relative - mean[:, None]) ** 2).mean(1).sqrt()

    return scores


CORES = [
    Core(
        "xScore",
        build=Scores,
        inputs=lambda: (torch.rand(4096, 32) * 0.9 + 0.05,),
        plain=by_moments,
        backward=True,
        tolerance=1e-3,
    ),
    Core(
        "micro zoo, group shuffle",
        build=lambda: settled(micro_zoo()["group-shuffle"][0](10), torch.randn(64, 1, 16, 16)),
        inputs=lambda: (torch.randn(64, 1, 16, 16),),
    ),
]
