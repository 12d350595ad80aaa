"""Answers to the exercises of SPLASH that their checks must reject."""


def check_forget__plain_mean(met, beta):
    return met.mean(0)


def check_forget__starts_at_zero(met, beta):
    x = 0 * met[0]
    for partner in met:
        x = (1 - beta) * x + beta * partner
    return x


def check_forget__weights_exchanged(met, beta):
    x = met[0]
    for partner in met[1:]:
        x = beta * x + (1 - beta) * partner
    return x


def check_alive__straight_line(edges, turnover, partners):
    return max(0.0, 1 - edges * turnover / partners)


def check_alive__every_slot_at_each_edge(edges, turnover, partners):
    return (1 - turnover) ** edges
