"""The two-dimensional shuffle mixer on an accelerator, against the recipe with its loops."""

import torch
from device_check import Core

from shuffle_nb.diffusion.relactrl import TwoDimShuffleMixer, mix_plain


class Fixed(torch.nn.Module):
    """A mixer with permutations that do not change: it can be compared with itself."""

    def __init__(self, length: int, **options):
        super().__init__()
        self.mixer = TwoDimShuffleMixer(**options)
        draw = torch.Generator().manual_seed(0)
        channels, tokens = self.mixer.draw_permutations(length, draw)
        self.register_buffer("channels", channels)
        for group, perm in enumerate(tokens):
            self.register_buffer(f"tokens{group}", perm)

    def permutations(self):
        tokens = [getattr(self, f"tokens{group}") for group in range(len(self.mixer.sizes))]
        return self.channels, tokens

    def forward(self, u):
        return self.mixer.mix(u, *self.permutations())


CORES = [
    Core(
        f"RelaCtrl mixer, {length} tokens x 1152",
        build=lambda length=length: Fixed(length, dim=1152, groups=6).eval(),
        inputs=lambda length=length: (torch.randn(2, length, 1152),),
        plain=lambda core: lambda u: mix_plain(core.mixer.attentions, u, *core.permutations()),
        backward=True,
    )
    for length in (256, 1024)
]
