"""Answers to the exercises of random-feature attention that their checks must reject."""

from shuffle_nb.kernels.random_feature_attention import arccos1, augment


def check_softmax__relu_mean(W, x):
    tokens = augment(x)
    scores = tokens[:, :1] @ W @ tokens[:, 1:].mT
    return ((scores.relu() / scores.shape[-1]) @ tokens[:, 1:])[:, 0]


def check_softmax__over_sequences(W, x):
    tokens = augment(x)
    scores = tokens[:, :1] @ W @ tokens[:, 1:].mT
    return (scores.softmax(0) @ tokens[:, 1:])[:, 0]


def check_softmax__query_and_key_swapped(W, x):
    tokens = augment(x)
    scores = tokens[:, :1] @ W.mT @ tokens[:, 1:].mT
    return (scores.softmax(-1) @ tokens[:, 1:])[:, 0]


def check_one_key__no_gate(x, z):
    return arccos1((1 + x[0] @ z[0]) * (1 + x[1] @ z[1]) / 4)


def check_one_key__no_bias(x, z):
    return arccos1((x[0] @ z[0]) * (x[1] @ z[1])) * (x[1] @ z[1])
