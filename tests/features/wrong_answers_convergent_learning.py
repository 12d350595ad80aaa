"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""


def check_hidden__gives_the_units_another_order(W, V):
    return W.flip(0), V.flip(1)


def check_hidden__only_scales_the_units(W, V):
    return 2 * W, V / 2


def check_hidden__forgets_to_turn_back(W, V):
    import torch

    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1))).Q
    return turn @ W, V


def check_shrink__cuts_without_shrinking(v, lam):
    return v * (v.abs() > lam)


def check_shrink__forgets_the_sign(v, lam):
    return (v.abs() - lam).clamp(min=0)


def check_shrink__goes_beyond_zero(v, lam):
    return v - lam * v.sign()
