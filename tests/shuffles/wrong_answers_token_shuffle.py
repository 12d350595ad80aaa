"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_pixel_order__leaves_the_order(channels, window):
    return torch.arange(window**2 * channels)


def check_pixel_order__takes_the_way_back(channels, window):
    return torch.arange(window**2 * channels).reshape(channels, window**2).T.flatten()


def check_pixel_order__names_a_channel_twice(channels, window):
    return torch.zeros(window**2 * channels, dtype=torch.long)


def check_uncompressed__believes_that_nothing_changes(num_tokens, dim, window):
    return 1.0


def check_uncompressed__forgets_the_shorter_sequence(num_tokens, dim, window):
    return float(window**4)


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
