"""The ensemble of networks that learns a permutation, on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.shuffles.exact_permutations import PermutationEnsemble


def ensemble():
    return PermutationEnsemble(8, 512, 256, generator=torch.Generator().manual_seed(0))


def one_by_one(core):
    """The plain form: network after network."""

    def outputs(x):
        scale = (core.k * core.width) ** -0.5
        pairs = zip(core.first, core.second, strict=True)
        return torch.stack([(x @ first).relu() @ second.T * scale for first, second in pairs])

    return outputs


CORES = [
    Core(
        "permutation ensemble",
        build=ensemble,
        inputs=lambda: (torch.nn.functional.normalize(torch.rand(255, 8)),),
        plain=one_by_one,
        backward=True,
    )
]
