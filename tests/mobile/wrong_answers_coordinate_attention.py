"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""


def check_private__exchanges_the_two_networks(x, rows, columns):
    z_h, z_w = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
    return x * columns(z_h) * rows(z_w.mT).mT


def check_private__forgets_the_columns(x, rows, columns):
    return x * rows(x.mean(3, keepdim=True))


def check_gates__opens_everything():
    return [1.0, 1.0], [1.0, 1.0]


def check_gates__opens_all_halfway():
    return [0.5, 0.5], [0.5, 0.5]
