"""Neural common neighbour on an accelerator."""

import torch
from device_check import Core, Through

from shuffle_nb.graphs.neural_common_neighbor import CSRGraph, NCNCPredictor, NCNPredictor, PureGCN

REASON = "how many neighbours a pair shares is known only once they are found"


def graph_and_pairs(n=8_000, degree=20, count=4096):
    links = torch.randint(n, (2, n * degree // 2))
    links = links[:, links[0] != links[1]]
    adj = CSRGraph.from_edge_index(links, n)
    pairs = torch.cat([links[:, : count // 2], torch.randint(n, (2, count // 2))], 1)
    return adj.indptr, adj.indices, pairs


def encode(module, x, indptr, indices):
    return module(x, CSRGraph(len(x), indptr, indices))


def encode_plain(core):
    """The normalised matrix, dense."""

    def encoded(x, indptr, indices):
        row = torch.arange(len(x), device=x.device).repeat_interleave(indptr.diff())
        a = torch.eye(len(x), device=x.device, dtype=x.dtype)
        a[row, indices] = 1
        s = a.sum(1).rsqrt()
        h = core.module.linear(x)
        return core.module.factors[0] * ((s[:, None] * a * s).to(h.dtype) @ h)

    return encoded


def score(module, x, indptr, indices, edge):
    return module(x, CSRGraph(len(x), indptr, indices), edge)


def score_plain(core):
    """Rows of the dense adjacency matrix, multiplied."""

    def scored(x, indptr, indices, edge):
        predictor = core.module
        row = torch.arange(len(x), device=x.device).repeat_interleave(indptr.diff())
        a = torch.zeros(len(x), len(x), device=x.device, dtype=x.dtype)
        a[row, indices] = 1
        lifted = predictor.lift(x)
        pooled = (a[edge[0]] * a[edge[1]]).to(lifted.dtype) @ lifted
        z = predictor.pair_branch(x[edge[0]] * x[edge[1]])
        return predictor.head(z + predictor.beta * predictor.shared_branch(pooled))

    return scored


CORES = [
    Core(
        "NCN, encoder",
        build=lambda: Through(PureGCN(64, 64).eval(), encode),
        inputs=lambda: (torch.randn(8_000, 64), *graph_and_pairs()[:2]),
        plain=encode_plain,
        backward=True,
    ),
    Core(
        "NCN, predictor",
        build=lambda: Through(NCNPredictor(64).eval(), score),
        inputs=lambda: (torch.randn(8_000, 64), *graph_and_pairs()),
        plain=score_plain,
        backward=True,
        compile=False,
        reason=REASON,
    ),
    Core(
        "NCNC, predictor",
        build=lambda: Through(NCNCPredictor(64).eval(), score),
        inputs=lambda: (torch.randn(8_000, 64), *graph_and_pairs(count=512)),
        backward=True,
        compile=False,
        reason=REASON,
    ),
]
