"""Bags of words for tests, dense and sparse."""

import warnings

import torch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bags(samples: int = 60, n: int = 9, share: float = 0.4, dtype=torch.float64):
    return (torch.rand(samples, n, generator=seeded(2)) < share).to(dtype)


def as_sparse(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x.to_sparse_csr()
