"""SPLASH on an accelerator: SLIM, and the propagation to unseen nodes."""

import torch
from device_check import Core

from shuffle_nb.graphs.splash import SLIM, propagate_unseen, time_encoding


def as_written(slim):
    """MLP_1 on every slot, the empty ones too, and its last layer before the sum."""

    def forward(x_node, x_nbr, dt, mask):
        code = time_encoding(dt, slim.time_dim, dtype=x_nbr.dtype)
        v = slim.edge_mlp(torch.cat([x_nbr, code], -1)) * mask[..., None]
        total = v.sum(1)
        mean = total / mask.sum(1, keepdim=True).clamp(min=1)
        own = slim.node_mlp(torch.cat([mean, x_node], -1))
        return slim.norm(own) + slim.skip_alpha * slim.skip_norm(total)

    return forward


def edge_by_edge(core):
    """Blocks of one edge."""
    return lambda *inputs: core(*inputs, block_size=1)


def questions():
    """Three slots in ten are filled."""
    sizes = 600, 100
    x_nbr, dt = torch.randn(*sizes, 100), 100 * torch.rand(sizes)
    return torch.randn(600, 100), x_nbr, dt, torch.rand(sizes) < 0.3


def edges():
    """500 edges between 200 nodes, half of them unseen."""
    src, dst = torch.randint(200, (2, 500))
    seen = torch.arange(200) < 100
    return torch.randn(200, 100) * seen[:, None], torch.zeros(200), src, dst, seen


CORES = [
    Core(
        "SPLASH, SLIM",
        build=lambda: SLIM(100).eval(),
        inputs=questions,
        plain=as_written,
        backward=True,
    ),
    Core(
        "SPLASH, propagation to unseen nodes",
        build=lambda: propagate_unseen,
        inputs=edges,
        plain=edge_by_edge,
        compile=False,
        reason="the size of a block's system depends on the data",
    ),
]
