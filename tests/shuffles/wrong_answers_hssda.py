"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch

from shuffle_nb.shuffles.hssda import move_areas


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
