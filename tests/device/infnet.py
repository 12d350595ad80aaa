"""INFNet's block on an accelerator."""

import torch
from device_check import Core, Through

from shuffle_nb.click_through.infnet import INFBlock, INFState, block_as_written


def run(block, *tensors):
    """Run the block on a batch of rows whose history is half padding."""
    *state, valid = tensors
    return tuple(block(INFState(*state), valid))


def as_written(core):
    """Eight attentions one after the other, with keys and values of all tokens."""
    return lambda *tensors: tuple(block_as_written(core.module, INFState(*tensors[:6]), tensors[6]))


def inputs():
    """Rows with 16 fields and a history of 1024 steps; the first row has none."""
    sizes = (16, 1024, 2, 4, 2, 2)
    valid = torch.rand(256, 1024) < 0.5
    valid[0] = False
    return *(torch.randn(256, n, 32) for n in sizes), valid


CORES = [
    Core(
        "INFNet, one block, 1024 steps",
        build=lambda: Through(INFBlock(32, 4, 2, 2), run),
        inputs=inputs,
        plain=as_written,
        backward=True,
    ),
]
