"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_token_permutation__moves_channels_instead_of_tokens(order, dim):
    return (order[None] * dim + torch.arange(dim)[:, None]).flatten()


def check_token_permutation__is_the_inverse(order, dim):
    return (order.argsort()[:, None] * dim + torch.arange(dim)).flatten()


def check_token_permutation__repeats_the_order(order, dim):
    return order.repeat_interleave(dim)


def check_positions__takes_the_favourite(num_positions):
    return [0, 1]


def check_positions__takes_late_ones_only(num_positions):
    return [num_positions - 2, num_positions - 1]
