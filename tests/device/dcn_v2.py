"""Cross networks on an accelerator, beside the plain forms with the same weights."""

import torch
from device_check import Core
from torch.nn.functional import linear

from shuffle_nb.click_through.dcn_v2 import CrossNetMix, CrossNetV2, DCNv2, mix_as_written


def plain_cross(net):
    """The formula, a line a layer."""

    def output(x0):
        x = x0
        for layer in net.layers:
            x = x0 * linear(x, layer.W, layer.bias) + x
        return x

    return output


def ids():
    return torch.randint(0, 1000, (8192, 20), generator=torch.Generator().manual_seed(0))


CORES = [
    Core(
        "cross network, 1,024 wide",
        build=lambda: CrossNetV2(1024),
        inputs=lambda: (torch.randn(4096, 1024) / 4,),
        plain=plain_cross,
        backward=True,
    ),
    Core(
        "mixture of low-rank crosses, 1,024 wide",
        build=lambda: CrossNetMix(1024, num_experts=4, rank=64),
        inputs=lambda: (torch.randn(4096, 1024) / 4,),
        plain=lambda net: lambda x: mix_as_written(net, x),
        backward=True,
    ),
    Core("DCN V2", build=lambda: DCNv2((1000,) * 20), inputs=lambda: (ids(),)),
]
