"""OptFS on an accelerator: the gated models, and the pruned table."""

import torch
import torch.nn.functional as F
from device_check import Core

from shuffle_nb.click_through.optfs import GatedDeepFM, GatedFM, compress

CARDS = (20_000,) * 10


def rows():
    """Ids of 4,096 rows of ten fields."""
    return (torch.randint(CARDS[0], (4096, len(CARDS))),)


def gates_first(core):
    """Gate every row of the table, then look up."""

    def output(x):
        table = core.embedding.gates()[:, None] * core.embedding.weight
        return core.head(F.embedding(x + core.offsets, table))

    return output


def soft_fm():
    model = GatedFM(CARDS, 16, linear=True)
    model.embedding.logit.data = torch.randn(sum(CARDS))
    model.embedding.temperature = 5.0
    return model


def pruned_deepfm():
    model = GatedDeepFM(CARDS, 16, (256, 128))
    model.embedding.logit.data = torch.randn(sum(CARDS)) - 0.5
    model.embedding.hard = True
    return compress(model)[0].eval()


def looked_up_plainly(core):
    """The same small table through PyTorch's own embedding."""

    def output(x):
        place = core.embedding.remap[x + core.offsets].long()
        return core.head(F.embedding(place, core.embedding.weight))

    return output


CORES = [
    Core("gated FM, soft", build=soft_fm, inputs=rows, plain=gates_first, backward=True),
    Core("DeepFM on a pruned table", build=pruned_deepfm, inputs=rows, plain=looked_up_plainly),
]
