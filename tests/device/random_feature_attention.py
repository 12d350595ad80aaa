"""Random-feature attention on an accelerator, beside a loop over heads."""

import torch
from device_check import Core

from shuffle_nb.kernels.random_feature_attention import RandomFeatureAttention, augment


def build():
    generator = torch.Generator().manual_seed(0)
    layer = RandomFeatureAttention.biased(16, 256, generator=generator)
    layer.V.data.normal_(generator=generator)
    return layer


def head_by_head(core):
    """The formula, one head after the other."""

    def output(x):
        tokens = augment(x)
        query, keys = tokens[:, :1], tokens[:, 1:]
        found = 0
        for W, v in zip(core.W.to(x.dtype), core.V.to(x.dtype), strict=True):
            weights = (query @ W @ keys.mT).relu() / keys.shape[1]
            found = found + (weights @ keys).squeeze(1) @ v
        return found

    return output


CORES = [
    Core(
        "random-feature attention",
        build=build,
        inputs=lambda: (torch.nn.functional.normalize(torch.randn(1024, 33, 16), dim=-1),),
        plain=head_by_head,
        backward=True,
    ),
]
