"""The codebook layer on an accelerator, against one codebook after another."""

import torch
from device_check import Core

from shuffle_nb.features.codebook_features import CodebookLayer, straight_through


def one_by_one(core):
    """The plain form: a loop over the groups."""

    def outputs(x):
        out = []
        for group, chunk in enumerate(x.chunk(core.groups, dim=-1)):
            weight, bias = core.norm_weight[group], core.norm_bias[group]
            z = torch.nn.functional.layer_norm(chunk, chunk.shape[-1:], weight, bias)
            scores = z.detach() @ core.codes[group].T / core.codes[group].norm(dim=1)
            ids = scores.topk(core.k, dim=-1).indices
            out.append(straight_through(z, core.codes[group][ids].mean(-2)))
        return torch.cat(out, dim=-1)

    return outputs


def directions(groups, count, width):
    """Centred directions, the same at every call: the layer norm only changes their length."""
    drawn = torch.randn(groups, count, width, generator=torch.Generator().manual_seed(0))
    return drawn - drawn.mean(-1, keepdim=True)


def layer(groups, count, width, k=1):
    """k codes a direction, of different lengths: rounding cannot choose another direction."""
    made = CodebookLayer(groups * width, count * k, k, groups).eval()
    codes = directions(groups, count, width).repeat_interleave(k, dim=1)
    made.codes.data = codes * (1 + 0.1 * (torch.arange(count * k) % k)).view(1, -1, 1)
    return made


def inputs(groups, count, width):
    return (directions(groups, count, width).transpose(0, 1)[:1024].flatten(1).unsqueeze(0),)


CORES = [
    Core(
        "codebook layer, 12 heads of 64, n = 10,000, k = 8",
        build=lambda: layer(12, 1250, 64, k=8),
        inputs=lambda: inputs(12, 1250, 64),
        plain=one_by_one,
    ),
    Core(
        "codebook layer, n = 64, k = 1",
        build=lambda: layer(1, 64, 64),
        inputs=lambda: inputs(1, 64, 64),
        plain=one_by_one,
        backward=True,
    ),
]
