"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_cross__puts_the_bias_outside(x0, x, U, V, b):
    return x0 * (x @ V @ U.T) + b + x


def check_cross__crosses_x_with_itself(x0, x, U, V, b):
    return x * (x @ V @ U.T + b) + x


def check_cross__exchanges_the_matrices(x0, x, U, V, b):
    return x0 * (x @ U @ V.T + b) + x


def check_fm__counts_every_pair_twice(w, size):
    return torch.kron(w.triu(1) + w.triu(1).T, torch.eye(size))


def check_fm__fills_whole_blocks(w, size):
    return torch.kron(w.triu(1), torch.ones(size, size))


def check_fm__keeps_the_diagonal(w, size):
    return torch.kron(w.triu(), torch.eye(size))


def check_vector__asks_for_rank_two(Q):
    return torch.linalg.matrix_rank(Q) <= 2


def check_vector__asks_for_rank_one(Q):
    return torch.linalg.matrix_rank(Q) <= 1
