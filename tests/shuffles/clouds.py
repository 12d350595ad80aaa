"""Boxes and points for tests."""

import torch


def random_boxes(n: int, seed: int = 0, spread: float = 6.0) -> torch.Tensor:
    """Boxes (n, 7) in float64 close enough to each other to overlap often."""
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(n, 7, generator=g, dtype=torch.float64)
    scale = torch.tensor([spread, spread, 2, 5, 3, 2, 7], dtype=torch.float64)
    shift = torch.tensor([30, -spread / 2, -1, 0.3, 0.3, 0.5, -3.5], dtype=torch.float64)
    return boxes * scale + shift


def random_points(n: int, seed: int = 0, margin: float = 5.0, dtype=torch.float32) -> torch.Tensor:
    """Points (n, 4) on the ground of KITTI and up to `margin` outside it."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.tensor([70.4 + 2 * margin, 80 + 2 * margin, 4, 1])
    points = torch.rand(n, 4, generator=g) * scale
    return (points - torch.tensor([margin, 40 + margin, 3, 0])).to(dtype)
