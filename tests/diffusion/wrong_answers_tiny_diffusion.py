"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""

import torch


def check_step_by_euler__forgets_to_leave_the_first_notation(z_t, eps, a_t, a_prev):
    sigma, following = (((1 - a) / a) ** 0.5 for a in (a_t, a_prev))
    return z_t + (following - sigma) * eps


def check_step_by_euler__does_not_come_back(z_t, eps, a_t, a_prev):
    sigma, following = (((1 - a) / a) ** 0.5 for a in (a_t, a_prev))
    return z_t / a_t**0.5 + (following - sigma) * eps


def check_step_by_euler__walks_the_wrong_way(z_t, eps, a_t, a_prev):
    sigma, following = (((1 - a) / a) ** 0.5 for a in (a_t, a_prev))
    return a_prev**0.5 * (z_t / a_t**0.5 - (following - sigma) * eps)


def check_even_levels__forgets_the_zero(n, smin, smax):
    return torch.linspace(smax, smin, n)


def check_even_levels__is_even_in_the_logarithm(n, smin, smax):
    ramp = torch.linspace(torch.tensor(smax).log(), torch.tensor(smin).log(), n).exp()
    return torch.cat([ramp, torch.zeros(1)])


def check_even_levels__goes_straight_to_zero(n, smin, smax):
    return torch.linspace(smax, 0, n + 1)
