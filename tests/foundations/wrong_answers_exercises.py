"""Answers that `check_mirror` must reject."""


def check_mirror__turns_the_row_that_it_was_given(row):
    row.reverse()
    return row


def check_mirror__gives_the_row_back(row):
    return list(row)


def check_mirror__sorts(row):
    return sorted(row)
