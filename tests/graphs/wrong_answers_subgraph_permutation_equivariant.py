"""Answers to the exercises of SPEN that their checks must reject."""

import torch


def check_overlap__padding_reaches_node_0(z, nodes, num_nodes):
    members = nodes.clamp(min=0).flatten()
    return z.new_zeros(num_nodes, z.shape[2]).index_add(0, members, z.flatten(0, 1))


def check_overlap__roots_only(z, nodes, num_nodes):
    return z.new_zeros(num_nodes, z.shape[2]).index_add(0, nodes[:, 0], z[:, 0])


def check_overlap__the_last_one_wins(z, nodes, num_nodes):
    found, real = z.new_zeros(num_nodes, z.shape[2]), nodes >= 0
    found[nodes[real]] = z[real]
    return found


def check_bell__powers_of_two(n):
    return 2 ** max(0, n - 1)


def check_bell__factorial(n):
    return torch.arange(1, n + 1).prod().item()


def check_first_step__never_none(G, H):
    return 1 if G[1] != 10 else 2


def check_first_step__one_step_is_enough(G, H):
    return None if G[1] in (10, 16) else 1
