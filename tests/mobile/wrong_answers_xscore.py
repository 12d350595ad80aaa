"""Answers to the exercises of xScore that their checks must reject; names of its notebook."""

import numpy as np


def check_score__sample_deviation(acc, lam):
    relative = acc / acc.amax(0)
    return relative.mean(1) - lam * relative.std(1)


def check_score__divides_rows(acc, lam):
    relative = acc / acc.amax(1, keepdim=True)
    return relative.mean(1) - lam * relative.std(1, correction=0)


def check_worst__against_all_sets(table):
    relative, rhos = table / table.amax(0), []
    for four in combinations(range(7), 4):
        worst = relative[:, list(four)].amin(1)
        rhos.append(rank_correlation(worst, xscore(table)))
    return float(np.mean(rhos))


def check_worst__no_division(table):
    rhos = []
    for four in combinations(range(7), 4):
        three = [d for d in range(7) if d not in four]
        worst = table[:, list(four)].amin(1)
        rhos.append(rank_correlation(worst, xscore(table[:, three])))
    return float(np.mean(rhos))


def check_weak__good_models():
    return [0.95, 0.9]


def check_weak__both_guess():
    return [0.5, 0.5]
