"""The rounding error of a weight to low rank: LQER, and L2QER where channels are weighted.

The error is `E = (W - Wq)ᵀ` `[K, N]`, and its factors `left [K, r]` and `right [r, N]` serve as
`y = x·Wqᵀ + (x·left)·right`. With weights s `[K]` of the channels it is `diag(s)·E` that is factored, and
`left` is divided by s again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.errors import MixqError

SMALLEST_MAGNITUDE = 1e-4
EXACT_SIZE = 256
"""A matrix with a side of at most this is decomposed exactly, larger ones by random projections."""
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0


def channel_weights(mean_magnitude: Tensor) -> Tensor:
    """The weights s `[K]` of channels whose inputs have these mean magnitudes `[K]`: around 1, in fp32."""
    magnitude = mean_magnitude.float().clamp_min(SMALLEST_MAGNITUDE)
    return magnitude / (magnitude.min() * magnitude.max()).sqrt()


def factors(error: Tensor, rank: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """left `[K, r]` and right `[r, N]` in fp32, whose product is the nearest of this rank to E `[K, N]`.

    r is at most the smaller side of E. Nearest by the squared error, times the squares of `weights` `[K]`
    where those are given. The same error gives the same factors, whatever torch's random state is. Raises
    MixqError where the error is not finite.
    """
    if not bool(torch.isfinite(error).all()):
        raise MixqError(
            "the rounding error of a weight is not finite, so that it has no low-rank factors: the weight "
            "has NaN or infinity. Repair it, or leave this layer in 16 bit."
        )
    rank = min(rank, *error.shape)
    weighted = error.float() if weights is None else error.float() * weights.to(error.device)[:, None]
    left, singular, right = _decomposed(weighted, rank)
    left, right = left[:, :rank], singular[:rank, None] * right[:rank]
    if weights is not None:
        left = left / weights.to(left)[:, None]
    return left.float(), right.float()


def _decomposed(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of a matrix, at least the first `rank` of each."""
    if min(matrix.shape) <= max(EXACT_SIZE, rank + OVERSAMPLING):
        left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left, singular, right
    # Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1.
    generator = torch.Generator(device="cpu").manual_seed(SEED)
    probes = torch.randn(
        matrix.shape[1], rank + OVERSAMPLING, generator=generator, dtype=torch.float32, device="cpu"
    )
    basis = torch.linalg.qr(matrix @ probes.to(matrix.device)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, singular, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, singular, right
