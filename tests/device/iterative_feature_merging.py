"""Iterative feature merging on an accelerator: distances of channels, and a whole network."""

import itertools

import torch
from device_check import Core

from shuffle_nb.features.iterative_feature_merging import (
    by_channel,
    channel_distance,
    channel_gram,
    iterative_feature_merging,
    merge_channels,
)

WIDTHS, TARGETS = (64, 512, 256, 10), [128, 64]


def weights():
    """Weights and biases of a network with two hidden layers."""
    found = []
    for before, after in itertools.pairwise(WIDTHS):
        found += [torch.randn(after, before) / before**0.5, torch.randn(after)]
    return tuple(found)


def distances(w, v):
    return channel_distance(channel_gram([w], [v]))


def pair_by_pair(core):
    """The same from the rows themselves, in float64 as well."""

    def found(w, v):
        rows = torch.cat([w.flatten(1), v.movedim(1, 0).flatten(1)], 1).double()
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()

    return found


def merged(*flat):
    layers = list(zip(flat[::2], flat[1::2], strict=True))
    result = iterative_feature_merging(layers, targets=TARGETS)
    return [x for layer in result.model for x in layer]


def as_written(core):
    """A new Gram matrix for every merge."""

    def found(*flat):
        layers = list(zip(flat[::2], flat[1::2], strict=True))
        counts = [[1] * len(w) for w, _ in layers[:-1]]
        while [len(c) for c in counts] != TARGETS:
            for depth, width in enumerate(TARGETS):
                n = len(counts[depth])
                if n > width:
                    columns = by_channel(layers[depth + 1][0], n)
                    d = distances(layers[depth][0], columns)
                    place = (d + torch.full_like(d, torch.inf).tril()).argmin()
                    pair = divmod(int(place), n)
                    layers, counts[depth] = merge_channels(layers, depth, *pair, counts[depth])
        return [x for layer in layers for x in layer]

    return found


CORES = [
    Core(
        "distances of 512 channels",
        build=lambda: distances,
        inputs=lambda: (torch.randn(512, 128, 3, 3), torch.randn(256, 512, 3, 3)),
        plain=pair_by_pair,
        backward=True,
    ),
    Core(
        "a network of 512 and 256 channels to a quarter",
        build=lambda: merged,
        inputs=weights,
        plain=as_written,
        compile=False,
        reason="it asks after every merge which two are next",
    ),
]
