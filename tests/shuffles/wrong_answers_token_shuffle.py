"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_fold__takes_four_neighbours_of_the_raster(y, grid, window):
    return y.reshape(len(y), -1, window**2 * y.shape[2])


def check_fold__puts_the_channel_before_the_place(y, grid, window):
    maps = y.mT.reshape(len(y), -1, *grid)
    return torch.nn.functional.pixel_unshuffle(maps, window).flatten(2).mT


def check_fold__splits_height_and_width_the_wrong_way_round(y, grid, window):
    split = y.reshape(len(y), window, grid[0] // window, window, grid[1] // window, -1)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(y), -1, window**2 * y.shape[2])


def check_fold__averages(y, grid, window):
    rows, columns = grid[0] // window, grid[1] // window
    return y.reshape(len(y), rows, window, columns, window, -1).float().mean((2, 4)).flatten(1, 2)


def _entropies(windows):
    def entropy(states):
        shares = states.bincount() / len(states)
        return -torch.special.xlogy(shares, shares).sum().item()

    joint = (windows * torch.tensor([64, 16, 4, 1])).sum(1)
    return sum(entropy(token) for token in windows.T), entropy(joint)


def check_total_correlation__has_the_wrong_sign(windows):
    single, joint = _entropies(windows)
    return joint - single


def check_total_correlation__forgets_the_joint_entropy(windows):
    return _entropies(windows)[0]


def check_total_correlation__counts_in_bits(windows):
    single, joint = _entropies(windows)
    return (single - joint) / 0.6931
