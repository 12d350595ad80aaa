"""Answers to the exercises of INFNet that their checks must reject."""

import torch


def check_lazy_read__forgets_the_answer(q, s, gate):
    weights = (q * (1 + gate)[:, None] @ s.transpose(1, 2)).softmax(-1)
    return weights @ s


def check_lazy_read__forgets_the_question(q, s, gate):
    return (q @ s.transpose(1, 2)).softmax(-1) @ s * (1 + gate)[:, None]


def check_count__only_the_keys_are_projected(n, s, d):
    return n * d**2 + s * d**2 + 2 * n * s * d


def check_count__counts_like_the_folded_form(n, s, d):
    return 3 * n * d**2 + 2 * n * s * d


def check_own_ids__shifts_padding_too(seq, items):
    return seq + items * torch.arange(seq.shape[1])[:, None]


def check_own_ids__padding_counts_as_an_item(seq, items):
    shift = (items + 1) * torch.arange(seq.shape[1])[:, None]
    return torch.where(seq > 0, seq + shift, 0)
