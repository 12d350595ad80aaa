"""Answers to the exercises of Scatterbrain that their checks must reject."""

import torch


def check_replace__counts_twice(logits, estimate, support):
    table = estimate + support * logits.exp()
    return table / table.sum(1, keepdim=True)


def check_replace__zero_off_the_support(logits, estimate, support):
    table = torch.where(support, logits.exp(), 0)
    return table / table.sum(1, keepdim=True)


def check_replace__forgets_the_normaliser(logits, estimate, support):
    return torch.where(support, logits.exp(), estimate)


def check_half_way__gives_the_squared_distance(d):
    odds = torch.log(torch.tensor(2.0)) / torch.log(torch.tensor(float(d)))
    return float(4 * odds / (1 + odds))


def check_half_way__forgets_the_dimension(d):
    return 0.6
