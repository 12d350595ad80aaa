"""Answers to the exercises of neural common neighbour that their checks must reject."""


def check_allocation__adamic_adar(adj):
    return 1 / adj.degree[:, None].double().log()


def check_allocation__counts(adj):
    return 0 * adj.degree[:, None].double() + 1


def check_allocation__one_row(adj):
    return 1 / adj.degree.double()


def check_untold__counts_all(count, raw):
    return count


def check_untold__sums_the_pixels(count, raw):
    return count - raw[:, 0]
