"""Random weights and activations with planted outlier columns."""

from __future__ import annotations

import torch
from torch import Tensor

INNER_LIMIT = 5.0
"""No ordinary element is larger, so that the outlier columns are exactly the planted ones."""


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A seeded generator on a device."""
    return torch.Generator(device).manual_seed(seed)


def random_weight(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """A weight `[N, K]` of the distribution with which `nn.Linear` begins."""
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features, dtype=torch.float32, device=device)
    return weight.uniform_(-bound, bound, generator=generator(device, seed)).to(dtype)


def planted_columns(in_features: int, columns: int, seed: int = 0) -> tuple[int, ...]:
    """Random columns of `in_features`, ascending."""
    device = torch.device("cpu")
    order = torch.randperm(in_features, dtype=torch.int64, device=device, generator=generator(device, seed))
    return tuple(sorted(order[:columns].tolist()))


def planted_activation(
    rows: int,
    in_features: int,
    columns: tuple[int, ...],
    size: float,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Tensor:
    """Normal values `[M, K]`, those in `columns` `size` times as large."""
    x = torch.randn(rows, in_features, dtype=torch.float32, device=device, generator=generator(device, seed))
    x.clamp_(-INNER_LIMIT, INNER_LIMIT)
    x[:, list(columns)] *= size
    return x.to(dtype)
