"""Answers to the exercises of DenseShift that their checks must reject."""

import torch


def check_integer_layer__forgets_the_sign(x, shift, negative):
    return (x[:, None] << shift).sum(-1)


def check_integer_layer__adds_over_the_outputs(x, shift, negative):
    moved = x[:, None] << shift
    return torch.where(negative, -moved, moved).sum(1)


def check_integer_layer__multiplies_as_floats(x, shift, negative):
    w = torch.where(negative, -1.0, 1.0) * 2.0**shift
    return x.float() @ w.T


def check_thaw__the_same_rate(rate, close):
    return rate


def check_thaw__ten_times(rate, close):
    return 10 * rate


def check_mean_size__of_three_bits(bits):
    return 2.5


def check_mean_size__forgets_the_last_shift(bits):
    return (2 ** (bits - 1) - 1) / 2
