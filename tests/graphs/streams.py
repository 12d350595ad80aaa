"""Streams for tests, and the plain form of what a question sees of them."""

from collections import deque

import torch

from shuffle_nb.graphs.edge_streams import EdgeStream


def random_stream(seed, edges=60, nodes=9, ties=True):
    """Edges with self loops, repeated pairs and, with ties, equal times."""
    generator = torch.Generator().manual_seed(seed)
    src, dst = torch.randint(nodes, (2, edges), generator=generator)
    t = torch.rand(edges, generator=generator, dtype=torch.float64).cumsum(0)
    return EdgeStream(src, dst, (4 * t).floor() if ties else t)


class OneByOne:
    """The most recent edges of each node, one edge at a time: the plain form."""

    def __init__(self, num_nodes, k):
        self.kept = [deque(maxlen=k) for _ in range(num_nodes)]

    def insert(self, i, j, t):
        self.kept[i].append((j, t))
        self.kept[j].append((i, t))

    def query(self, node, time):
        return [(j, time - t) for j, t in reversed(self.kept[node]) if t < time - 1e-7]


def as_lists(nbr, dt, mask):
    rows = zip(nbr.tolist(), dt.tolist(), mask.tolist(), strict=True)
    return [[(j, a) for j, a, m in zip(*row, strict=True) if m] for row in rows]


def close_lists(one, other):
    return [[j for j, _ in row] for row in one] == [[j for j, _ in row] for row in other] and (
        torch.allclose(*(torch.tensor([a for row in x for _, a in row]) for x in (one, other)))
    )
