"""Answers that the notebook's checks must reject; they run in the notebook's own kernel."""


def check_three__reads_each_of_the_pair_twice():
    return (1.0, 1.0, -1.0), (0.0, 0.0, 0.0)


def check_three__puts_all_on_one_side():
    return (0.5**0.5, 0.5**0.5, 1.0), (0.0, 0.0, 0.0)


def check_lengths__shuffles_the_columns(x):
    return shuffle_columns(x, torch.Generator().manual_seed(0))


def check_lengths__leaves_the_texts_as_they_are(x):
    return x


def check_lengths__forgets_the_frequencies(x):
    import torch

    rank = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    return (rank < x.sum(1, keepdim=True)).to(x.dtype)
