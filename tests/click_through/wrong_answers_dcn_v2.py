"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_cross__puts_the_bias_outside(x0, x, U, V, b):
    return x0 * (x @ V @ U.T) + b + x


def check_cross__crosses_x_with_itself(x0, x, U, V, b):
    return x * (x @ V @ U.T + b) + x


def check_cross__exchanges_the_matrices(x0, x, U, V, b):
    return x0 * (x @ U @ V.T + b) + x


def check_vector__asks_for_rank_two(Q):
    return torch.linalg.matrix_rank(Q, tol=1e-4) <= 2


def check_vector__asks_for_rank_one(Q):
    return torch.linalg.matrix_rank(Q, tol=1e-4) <= 1
