"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch

from shuffle_nb.shuffles.hssda import bev_areas, move_areas, shuffle_bev_points


def check_put_back__shuffles_again(shuffled, perm):
    return move_areas(shuffled, perm)


def check_put_back__reverses_the_list(shuffled, perm):
    return move_areas(shuffled, perm[::-1])


def check_rival__takes_the_least_consistent(scores, count):
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[(-scores[:, 2]).topk(count).indices] = True
    return chosen


def check_rival__keeps_all_above_one_half(scores, count):
    return scores[:, 0] > 0.5


def check_moved__goes_with_the_corner(boxes, perm):
    corner = boxes.clone()
    corner[:, :2] -= boxes[:, 3:5] / 2
    moved = shuffle_bev_points(corner, perm, (0.0, 48.0), (0.0, 48.0))
    moved[:, :2] += boxes[:, 3:5] / 2
    return moved


def check_moved__moves_back(boxes, perm):
    return shuffle_bev_points(boxes, perm.argsort(), (0.0, 48.0), (0.0, 48.0))


def check_moved__puts_all_in_the_middle_of_an_area(boxes, perm):
    areas = bev_areas((0.0, 48.0), (0.0, 48.0)).to(boxes)
    moved = boxes.clone()
    moved[:, :2] = (areas[perm[0], 0::2] + areas[perm[0], 1::2]) / 2
    return moved
