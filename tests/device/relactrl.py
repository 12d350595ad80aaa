"""The two-dimensional shuffle mixer on an accelerator, against the recipe with its loops."""

import torch
from device_check import Core

from shuffle_nb.diffusion.relactrl import TwoDimShuffleMixer


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


def recipe(core: Fixed, u: torch.Tensor) -> torch.Tensor:
    """The published loops: groups one by one, the way back by a sorted permutation."""
    mixed, start = torch.empty_like(u), 0
    channel_perm, token_perms = core.permutations()
    for attention, perm in zip(core.mixer.attentions, token_perms, strict=True):
        channels = channel_perm[start : start + attention.dim]
        start += attention.dim
        flat = u[:, :, channels].flatten(1)[:, perm]
        z = flat.view(len(u) * attention.segments, -1, attention.dim)
        z = attention.attend(z)
        back = z.view(flat.shape)[:, perm.argsort()]
        mixed[:, :, channels] = back.view(len(u), -1, attention.dim).to(u.dtype)
    return mixed


CORES = [
    Core(
        f"RelaCtrl mixer, {length} tokens x 1152",
        build=lambda length=length: Fixed(length, dim=1152, groups=6).eval(),
        inputs=lambda length=length: (torch.randn(2, length, 1152),),
        plain=lambda core: lambda u: recipe(core, u),
        backward=True,
    )
    for length in (256, 1024)
]
