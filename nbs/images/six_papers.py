"""Draw six_papers.png, the picture of the home page: run this file from anywhere."""

from pathlib import Path

import numpy as np
import torch

from shuffle_nb.features.codebook_features import CodebookLayer
from shuffle_nb.foundations import figures
from shuffle_nb.foundations.datasets import digits
from shuffle_nb.kernels.snnk import UniversalRandomFeatures
from shuffle_nb.mobile.bias_loss import bias_weight
from shuffle_nb.mobile.coordinate_attention import CoordinateAttention
from shuffle_nb.shuffles.token_shuffle import token_shuffle

figures.use_house_style()
torch.manual_seed(0)
figure, axes = figures.plt.subplots(1, 6, figsize=(11, 2.3))
for axis in axes:
    figures.image_axis(axis)

tokens = token_shuffle(torch.arange(16).view(1, 16, 1), grid=(4, 4), window=2)[0]
axes[0].imshow(tokens, cmap="viridis")
for (row, column), value in np.ndenumerate(tokens.numpy()):
    axes[0].text(column, row, value, ha="center", va="center", color="w" if value < 11 else "k")

grid = torch.linspace(0, 1, 50)
axes[1].plot(grid, bias_weight(grid, 1.0, 0.9), color=figures.PALETTE[0], lw=3)
axes[1].set(box_aspect=1)

attention = CoordinateAttention(1, min_channels=8).eval()
digit = digits().train_images[3]
g_h, g_w = (gate[0, 0].detach() for gate in attention.gates(torch.randn(1, 1, 8, 8) + 2 * digit))
axes[2].imshow(g_h * g_w, cmap="viridis")
axes[2].imshow(digit[0], cmap="gray_r", alpha=0.35)

angles = torch.linspace(0, 2 * torch.pi, 40)
circle = torch.stack([angles.cos(), angles.sin()], 1)
maps = UniversalRandomFeatures(2, 256, "cos", generator=torch.Generator().manual_seed(0))
axes[3].imshow(maps.estimate(circle, 2 * circle), cmap="RdBu")

layer = CodebookLayer(2, num_codes=12, similarity="euclidean").eval()
plane = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 60)] * 2, indexing="ij"), -1)
layer(plane.view(1, -1, 2))
axes[4].imshow(layer.last_ids.view(60, 60), cmap="tab20")

months = np.exp(2j * np.pi * np.arange(12) / 12)
axes[5].plot(months.real, months.imag, "o", color=figures.PALETTE[2], ms=9)
axes[5].set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")

names = (
    "Token-Shuffle",
    "Bias loss",
    "Coordinate\nattention",
    "Kernels (SNNK)",
    "Codebooks",
    "Bag of words",
)
for axis, name in zip(axes, names, strict=True):
    axis.set_title(name, loc="center", fontsize=11)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
