"""Answers to the exercises of ARM-Net that their checks must reject."""

import torch


def check_sparsemax__softmax(z):
    return z.softmax(0)


def check_sparsemax__all_stay_open(z):
    return z - (z.sum() - 1) / len(z)


def check_powers__divides_the_wrong_way():
    return [2.0, 1.0, 1.0], False


def check_powers__a_gate_could():
    return torch.tensor([2.0, 1.0, -1.0]).tolist(), True
