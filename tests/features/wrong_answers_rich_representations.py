"""Answers to the exercises of rich representations that their checks must reject."""

import torch


def check_copies__same_penalty(weight, alpha, n):
    return weight.repeat(n, 1) / n, alpha


def check_copies__weights_are_not_shared_out(weight, alpha, n):
    return weight.repeat(n, 1), n * alpha


def check_kept__no_feature_is_kept_twice(m, r, n):
    return n * r


def check_kept__by_all_runs(m, r, n):
    return m * (r / m) ** n


def check_hand_made__the_inputs_themselves(x):
    return x


def check_hand_made__squares(x):
    return torch.cat([x, x.square()], dim=1)


def check_hand_made__too_many_columns(x):
    return (x[:, :, None] * x[:, None]).flatten(1)
