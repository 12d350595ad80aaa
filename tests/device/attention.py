"""The foundations' attention on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.foundations.attention import Attention


def as_written(core):
    """The formula with its whole matrix of weights."""

    def output(x):
        query, key, value = core.heads(x)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if core.causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mixed = scores.softmax(-1) @ value
        return core.project(mixed.transpose(1, 2).flatten(2))

    return output


CORES = [
    Core(
        f"attention of 1,024 tokens{', causal' if causal else ''}",
        build=lambda causal=causal: Attention(256, 8, causal=causal),
        inputs=lambda: (torch.randn(4, 1024, 256),),
        plain=as_written,
        backward=True,
    )
    for causal in (False, True)
]
