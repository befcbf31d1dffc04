"""How close one tensor is to another, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixq_compile.errors import OptionError


def sqnr(reference: Tensor, output: Tensor) -> float:
    """Signal-to-quantization-noise ratio, `10 log10(Σ reference² / Σ (reference − output)²)`, in dB.

    Infinite where the two are equal, minus infinity where only the reference is zero, NaN where either
    holds a NaN. Each halving of the error adds 6 dB.

        >>> sqnr(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))
        26.98...

    Raises OptionError where the shapes differ or there is no element.
    """
    error = relative_error(reference, output)
    if error == 0:
        return math.inf
    return -20 * math.log10(error) if math.isfinite(error) else -error


def relative_error(reference: Tensor, output: Tensor) -> float:
    """The Frobenius norm of the difference over that of the reference: 0.01 is one percent.

    0 where the two are equal, even where both are zero; infinite where only the reference is zero.

    Raises OptionError where the shapes differ or there is no element.
    """
    wanted, got = _as_float64(reference, output)
    noise = float(torch.linalg.vector_norm(wanted - got))
    signal = float(torch.linalg.vector_norm(wanted))
    if signal == 0:
        return noise if math.isnan(noise) else math.inf if noise > 0 else 0.0
    return noise / signal


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """The cosine between corresponding rows (last dimension), averaged over all rows; 1 is best.

    A pair of zero rows counts 1, a zero row beside another one 0.

    Raises OptionError where the shapes differ or there is no element.
    """
    first, second = _as_float64(a, b)
    product = (first * second).sum(dim=-1)
    norms = torch.linalg.vector_norm(first, dim=-1) * torch.linalg.vector_norm(second, dim=-1)
    equal_zeros = ((first == 0) & (second == 0)).all(dim=-1)
    cosine = torch.where(norms == 0, equal_zeros.double(), product / norms)
    return float(cosine.mean())


def _as_float64(reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != output.shape:
        raise OptionError(
            f"only tensors of one shape can be compared, not {tuple(reference.shape)} "
            f"and {tuple(output.shape)}."
        )
    if reference.numel() == 0:
        raise OptionError(f"tensors of shape {tuple(reference.shape)} hold nothing to compare.")
    return reference.detach().double(), output.detach().to(reference.device).double()
