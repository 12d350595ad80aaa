"""Shuffled scenes, the overlap of turned boxes and the bird's-eye network on an accelerator."""

import torch
from device_check import Core

from shuffle_nb.shuffles.hssda import BEVDetector, rotated_iou_bev, shuffle_bev_points
from shuffle_nb.shuffles.point_clouds import X_RANGE, Y_RANGE, rasterise

ANCHORS = [[-0.6, 0.8, 0.6, 1.7], [-0.6, 1.8, 0.6, 1.7], [-1.0, 3.9, 1.6, 1.6]]


def scenes(batch, points):
    """Points within the range, with height and intensity."""
    (x0, x1), (y0, y1) = X_RANGE, Y_RANGE
    low, high = torch.tensor([[x0, y0, -2.0, 0.0], [x1, y1, 1.0, 1.0]])
    return low + torch.rand(batch, points, 4) * (high - low)


def orders(batch):
    return torch.stack([torch.randperm(4) for _ in range(batch)])


def boxes(count):
    place, size = 40 * torch.rand(count, 3), 1 + 3 * torch.rand(count, 3)
    return torch.cat([place, size, 6 * torch.rand(count, 1)], dim=1)


def area_by_area(core):
    """The plain form: for every scene and area, move the points that lie in it."""
    (x0, x1), (y0, y1) = X_RANGE, Y_RANGE
    width, height = (x1 - x0) / 2, (y1 - y0) / 2
    corners = [(1, 0), (1, 1), (0, 1), (0, 0)]  # far or near, left or right of each area

    def moved(points, perm):
        out = points.clone()
        far, left = points[..., 0] >= x0 + width, points[..., 1] >= y0 + height
        for scene, order in enumerate(perm.tolist()):
            for area, (ahead, aside) in enumerate(corners):
                inside = (far[scene] == bool(ahead)) & (left[scene] == bool(aside))
                to_ahead, to_aside = corners[order[area]]
                step = [(to_ahead - ahead) * width, (to_aside - aside) * height]
                shift = torch.tensor(step, device=points.device)
                out[scene, inside, :2] = points[scene, inside, :2] + shift
        return out

    return moved


CORES = [
    Core(
        "scenes of 20,000 points, shuffled",
        build=lambda: shuffle_bev_points,
        inputs=lambda: (scenes(8, 20_000), orders(8)),
        plain=area_by_area,
    ),
    Core(
        "overlap of 500 x 500 turned boxes",
        build=lambda: rotated_iou_bev,
        inputs=lambda: (boxes(500), boxes(500)),
    ),
    Core(
        "points on a map",
        build=lambda: lambda points: rasterise(points, (400, 352)),
        inputs=lambda: (scenes(8, 20_000),),
    ),
    Core(
        "bird's-eye network, shuffled",
        build=lambda: BEVDetector(ANCHORS).eval(),
        inputs=lambda: (scenes(4, 20_000), orders(4)),
    ),
]
