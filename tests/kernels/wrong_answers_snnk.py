"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_two_factors__forgets_the_half(u, v):
    z = u + v
    return torch.exp(z @ z), torch.exp(-(u @ u + v @ v) / 2)


def check_two_factors__takes_the_product_alone(u, v):
    return torch.exp(u @ v), torch.ones(())


def check_sinks__forgets_the_relu(x, G):
    return x @ G.T / len(G) ** 0.5


def check_sinks__forgets_the_scale(x, G):
    return (x @ G.T).relu()
