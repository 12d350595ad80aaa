"""Answers to the exercises of iterative feature merging that their checks must reject."""

import torch


def check_tolerates__looks_at_large_inputs_only(f):
    z = torch.linspace(10, 20, 50)
    return torch.allclose(2 * f(z), f(2 * z), atol=1e-4)


def check_tolerates__asks_only_for_what_is_zero_at_zero(f):
    return f(torch.zeros(1)).item() == 0.0


def check_tolerates__knows_only_piecewise_linear_ones_by_name(f):
    return f.__name__ in ("relu", "leaky_relu", "relu6")


def check_scales__leaves_all_as_it_is(w, v):
    return torch.ones(len(w))


def check_scales__divides_the_wrong_way_round(w, v):
    return (w.norm(dim=1) / v.norm(dim=0)).sqrt()


def check_scales__makes_every_maker_one_long(w, v):
    return 1 / w.norm(dim=1)


def check_other_way__averages_both(w, v, groups):
    made = torch.stack([w[group].mean(0) for group in groups])
    return made, torch.stack([v[:, group].mean(1) for group in groups], dim=1)


def check_other_way__does_what_merge_groups_does(w, v, groups):
    made = torch.stack([w[group].sum(0) for group in groups])
    return made, torch.stack([v[:, group].mean(1) for group in groups], dim=1)


def check_other_way__keeps_the_first_of_each_group(w, v, groups):
    first = [group[0] for group in groups]
    return w[first], v[:, first]
