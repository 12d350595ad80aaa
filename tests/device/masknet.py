"""Serial and parallel MaskNet on an accelerator."""

import torch
from device_check import Core
from torch import nn

from shuffle_nb.click_through.masknet import ParallelMaskNet, SerialMaskNet


def as_written(core):
    """The plain form: a layer norm for each field in a loop, then the formula of each block."""
    norms = nn.ModuleList(nn.LayerNorm(core.shape[1]) for _ in range(core.shape[0]))
    for i, norm in enumerate(norms):
        norm.to(core.emb_norm.weight.device)
        norm.weight.data, norm.bias.data = core.emb_norm.weight[i].data, core.emb_norm.bias[i].data

    def layer(block, v_emb, v):
        mask = block.mask.project(block.mask.aggregate(v_emb).relu())
        return block.norm(block.linear(mask * v)).relu()

    def output(emb):
        parts = zip(norms, emb.chunk(len(norms), dim=1), strict=True)
        v = torch.cat([norm(part) for norm, part in parts], dim=1).flatten(1)
        v_emb = emb.flatten(1)
        if isinstance(core, ParallelMaskNet):
            return core.head(torch.cat([layer(b, v_emb, v) for b in core.blocks], dim=1))
        for block in core.blocks:
            v = layer(block, v_emb, v)
        return core.head(v)

    return output


CORES = [
    Core(
        "serial MaskNet",
        build=lambda: SerialMaskNet(39, 10, (400, 400, 400), 0.2),
        inputs=lambda: (torch.randn(4096, 39, 10),),
        plain=as_written,
        backward=True,
    ),
    Core(
        "parallel MaskNet",
        build=lambda: ParallelMaskNet(39, 10, 3, 64, (400, 400)),
        inputs=lambda: (torch.randn(4096, 39, 10),),
        plain=as_written,
        backward=True,
    ),
]
