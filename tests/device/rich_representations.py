"""Networks side by side on an accelerator, one by one and as a stack."""

import torch
from device_check import Core

from shuffle_nb.features.rich_representations import (
    ConcatFeatures,
    FeatureNet,
    NetStack,
    ProbeHead,
    ridge,
)


def some_nets():
    return [FeatureNet((64, 128, 128, 64), 10) for _ in range(8)]


def one_by_one(stack):
    """The same networks in a loop, with the stack's own weights."""

    def logits(x):
        rows = []
        for k in range(len(stack.weights[0])):
            h = x
            for weight, bias in zip(stack.weights[:-1], stack.biases[:-1], strict=True):
                h = (h @ weight[k] + bias[k]).relu()
            rows.append(h @ stack.weights[-1][k] + stack.biases[-1][k])
        return torch.stack(rows)

    return logits


def errors_of_left_out_rows(z, targets):
    return ridge(z, targets)[0]


def one_solve_a_penalty(core):
    """The same errors, with a linear system for each penalty."""

    def errors(z, targets):
        x = (z - z.mean(0)) / z.std(0, correction=0)
        t = targets - targets.mean(0)
        found = []
        for alpha in torch.logspace(-2, 4, 13).tolist():
            gram = x.T @ x + alpha * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            inverse = torch.linalg.solve(gram, x.T)
            own = (x * inverse.T).sum(1) + 1 / len(x)
            found.append(((t - x @ (inverse @ t)) / (1 - own)[:, None]).square().mean(0))
        return torch.stack(found)

    return errors


CORES = [
    Core(
        "rich representations, a stack of networks",
        build=lambda: NetStack(some_nets()),
        inputs=lambda: (torch.randn(512, 64),),
        plain=one_by_one,
        backward=True,
    ),
    Core(
        "rich representations, features side by side",
        build=lambda: ConcatFeatures(some_nets()),
        inputs=lambda: (torch.randn(512, 64),),
    ),
    Core(
        "rich representations, a head with BatchNorm",
        build=lambda: ProbeHead(512, 10),
        inputs=lambda: (torch.randn(256, 512),),
        backward=True,
    ),
    Core(
        "rich representations, a ridge for every penalty",
        build=lambda: errors_of_left_out_rows,
        inputs=lambda: (torch.randn(1200, 256).double(), torch.randn(1200, 10).double()),
        plain=one_solve_a_penalty,
        compile=False,
        autocast=False,
        reason="float64 by design, and nearly all of it is one decomposition",
    ),
]
