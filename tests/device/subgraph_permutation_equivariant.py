"""SPEN, its layer and the cutting of ego networks on an accelerator."""

import torch
from device_check import Core, Through

from shuffle_nb.graphs.subgraph_permutation_equivariant import (
    SPEN,
    EquivariantLinear,
    ego_subgraphs,
    equivariant_maps_2to2,
)

NODES = 2_000


def ring():
    """Each node is linked with the next three."""
    v = torch.arange(NODES)
    return torch.stack([v.repeat(3), torch.cat([(v + i) % NODES for i in (1, 2, 3)])])


def put_first(layer):
    """All fifteen maps, then the weights."""

    def weighed(x, mask):
        maps = equivariant_maps_2to2(x, mask).flatten(1, 2).flatten(2)
        weights, m = layer.weight["22"].flatten(1).to(x.dtype), x.shape[-1]
        y = (weights @ maps).unflatten(2, (m, m))
        return y * (mask[:, :, None] & mask[:, None])[:, None]

    return weighed


def prefix(count, m):
    return torch.arange(m) < torch.randint(1, m + 1, (count, 1))


CORES = [
    Core(
        "equivariant layer, 15 maps",
        build=lambda: EquivariantLinear({2: 16}, {2: 16}),
        inputs=lambda: (torch.randn(1_000, 16, 16, 16), prefix(1_000, 16)),
        plain=put_first,
        backward=True,
    ),
    Core(
        "SPEN",
        build=lambda: Through(SPEN(2), lambda model, egos: model(egos, NODES)),
        inputs=lambda: (ego_subgraphs(ring(), NODES),),
        backward=True,
    ),
    Core(
        "ego networks",
        build=lambda: lambda edges: ego_subgraphs(edges, NODES, 2).x,
        inputs=lambda: (ring(),),
        compile=False,
        autocast=False,
        reason="the sizes follow from the graph, and nothing is multiplied",
    ),
]
