"""Bias loss and SkipblockNet on an accelerator."""

import torch
import torch.nn.functional as F
from device_check import Core, settled
from torch import nn

from shuffle_nb.mobile.bias_loss import BiasLoss, skipblocknet_m


class LossOfFeatures(nn.Module):
    """Bias loss of fixed logits and answers, as a function of the features alone."""

    def __init__(self):
        super().__init__()
        self.criterion = BiasLoss(mode="local", reduction="none")
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(128, 100, generator=generator))
        self.register_buffer("target", torch.randint(0, 100, (128,), generator=generator))

    def forward(self, features):
        return self.criterion(self.logits, self.target, features)


def as_published(core):
    """Widen, torch.var, range of the batch, exponential."""

    def losses(features):
        v = features.detach().float().flatten(1).var(1)
        weights = torch.exp(0.3 * (v - v.min()) / (v.max() - v.min())) - 0.3
        return weights * F.cross_entropy(core.logits, core.target, reduction="none")

    return losses


CORES = [
    Core(
        "bias loss",
        build=LossOfFeatures,
        inputs=lambda: (torch.randn(128, 960, 7, 7).relu(),),
        plain=as_published,
        backward=True,
        tolerance=1e-3,  # variances that nearly agree are stretched to the range of the batch
    ),
    Core(
        "SkipblockNet-M",
        build=lambda: settled(skipblocknet_m(100), torch.randn(8, 3, 224, 224)),
        inputs=lambda: (torch.randn(8, 3, 224, 224),),
    ),
]
