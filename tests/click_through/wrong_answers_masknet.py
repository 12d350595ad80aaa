"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

from itertools import pairwise

import torch


def check_dot_product__counts_each_product_twice():
    exchange = torch.eye(4)[[2, 3, 0, 1]]
    return exchange, torch.eye(4), torch.ones(1, 4)


def check_dot_product__multiplies_each_number_by_itself():
    return torch.eye(4), torch.eye(4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])


def check_frozen__scales_rows(block, v_emb):
    return block.linear.weight * block.mask(v_emb)[:, :3].mean(0)[:, None]


def check_frozen__takes_the_mask_of_one_row(block, v_emb):
    return block.linear.weight * block.mask(v_emb)[0]


def check_multiplications__forgets_the_head(m, hidden, r):
    widths = [m, *hidden]
    return sum(int(r * z) * (m + z) + q * z for z, q in pairwise(widths))


def check_multiplications__lets_masks_read_the_hidden_vector(m, hidden, r):
    widths = [m, *hidden]
    return sum(int(r * z) * 2 * z + q * z for z, q in pairwise(widths)) + widths[-1]
