"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch

from shuffle_nb.shuffles.layer_shuffle import layer_shuffle


def check_each__takes_the_first_order_for_all(x, layer, perms):
    return layer_shuffle(x, layer, 1.0, True, perm=perms[0])


def check_each__forgets_to_restore(x, layer, perms):
    return layer(torch.take_along_dim(x, perms[..., None], 1))


def check_each__restores_by_the_same_permutation(x, layer, perms):
    outputs = layer(torch.take_along_dim(x, perms[..., None], 1))
    return torch.take_along_dim(outputs, perms[..., None], 1)


def check_first__shuffles_the_class_token_too(num_tokens, generator):
    return torch.randperm(num_tokens, generator=generator)


def check_first__moves_nothing(num_tokens, generator):
    return torch.arange(num_tokens)


def check_first__only_turns_the_line(num_tokens, generator):
    shift = int(torch.randint(num_tokens - 1, (), generator=generator))
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, num_tokens).roll(shift)])
