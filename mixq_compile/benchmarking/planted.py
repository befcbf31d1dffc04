"""Random weights and activations with planted outlier columns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

INNER_LIMIT = 5.0
"""No ordinary element is larger, so that the outlier columns are exactly the planted ones."""
SMALLEST_GAIN, LARGEST_GAIN = 8.0, 40.0
"""Channel gains of planted outliers in models: log-spaced, as the maxima of real ones roughly are."""
PART_OF_CHANNELS = 1 / 256
"""How many channels of a model's hidden state are outliers: 16 of 4096."""


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
    chosen = torch.randperm(in_features, generator=generator(torch.device("cpu"), seed))[:columns]
    return tuple(sorted(chosen.tolist()))


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
    x = torch.randn(rows, in_features, device=device, generator=generator(device, seed))
    x.clamp_(-INNER_LIMIT, INNER_LIMIT)
    x[:, list(columns)] *= size
    return x.to(dtype)


def plant_outliers(model: Any, seed: int = 0) -> None:
    """Gives a transformers decoder outlier channels, in place and with equal results on every call.

    Norm weights are enlarged in a few channels (inputs of q/k/v and gate/up), and so are rows of
    up_proj (inputs of down_proj).
    """
    for number, layer in enumerate(model.model.layers):
        for offset, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            _enlarge(norm.weight.data, seed + 3 * number + offset)
        _enlarge(layer.mlp.up_proj.weight.data, seed + 3 * number + 2)


def _enlarge(values: Tensor, seed: int) -> None:
    """Multiplies some rows of values by log-spaced gains."""
    count = max(1, math.floor(values.shape[0] * PART_OF_CHANNELS))
    rows = list(planted_columns(values.shape[0], count, seed))
    gains = torch.logspace(math.log10(SMALLEST_GAIN), math.log10(LARGEST_GAIN), count, device=values.device)
    values[rows] *= gains.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
