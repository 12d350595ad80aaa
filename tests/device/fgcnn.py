"""FGCNN on an accelerator: the generator, the inner products and the whole model."""

from functools import partial

import torch
from device_check import Core, settled

from shuffle_nb.click_through.fgcnn import (
    FGCNN,
    FeatureGeneration,
    InnerProduct,
    generate_as_written,
)

CARDS = (200,) * 39


def generator():
    """The configuration for Criteo, normalised as after one batch."""
    sizes = ((38, 40, 42, 44), (9,) * 4, (2,) * 4, (3,) * 4)
    return settled(FeatureGeneration(39, 20, *sizes), torch.randn(256, 39, 20))


def by_mask(core):
    """The triangle as the reference code takes it, with a mask over each square."""

    def products(features):
        square = torch.bmm(features, features.mT)
        mask = torch.ones_like(square[0], dtype=torch.bool).triu(1)
        return square.masked_select(mask).view(len(features), -1)

    return products


def model():
    """Embeddings of size one, so that no activation vanishes."""
    return settled(FGCNN(CARDS, hidden=(400, 400), embedding_std=1.0), ids())


def ids():
    return torch.randint(200, (512, 39))


CORES = [
    Core(
        "feature generation",
        build=generator,
        inputs=lambda: (torch.randn(512, 39, 20),),
        plain=lambda core: partial(generate_as_written, core),
        backward=True,
    ),
    Core(
        "feature generation in training, small stages",
        build=lambda: FeatureGeneration(8, 8, (4, 6), (3, 3), (2, 2), (2, 2)),
        inputs=lambda: (torch.randn(4096, 8, 8),),
        plain=lambda core: partial(generate_as_written, core),
        backward=True,
    ),
    Core(
        "inner products",
        build=lambda: InnerProduct(153),
        inputs=lambda: (torch.randn(512, 153, 20),),
        plain=by_mask,
        backward=True,
    ),
    Core("FGCNN", build=model, inputs=lambda: (ids(),), backward=True),
]
