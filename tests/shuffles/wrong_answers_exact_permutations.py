"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch

from shuffle_nb.shuffles.exact_permutations import ntk_kernels, prediction_stats


def check_regression__forgets_the_training_set(unit):
    train = torch.eye(unit.shape[1], dtype=unit.dtype)
    return ntk_kernels(unit, train)[1]


def check_regression__takes_the_kernel_of_the_initial_network(unit):
    train = torch.eye(unit.shape[1], dtype=unit.dtype)
    return torch.linalg.solve(ntk_kernels(train, train)[0], ntk_kernels(unit, train)[0].mT).mT


def check_threshold__keeps_the_sign(k, n):
    return 0.0


def check_threshold__takes_the_mean_of_the_ones(k, n):
    return prediction_stats(k, n)[0]
