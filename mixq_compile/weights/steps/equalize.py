"""Equalisation (SmoothQuant): magnitude moved from the channels of an activation into its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.errors import OptionError

LARGEST = 2.0**13
"""Factors lie between its inverse and it: both a factor and its inverse are then normal numbers in fp16."""


@dataclass(frozen=True)
class Equalize:
    """Divides channel k of x by `s_k` and multiplies column k of W by it: `x · Wᵀ` stays as it is.

    `s_k = max|x_k|^alpha / max|W_k|^(1 - alpha)`, clamped to `[1 / LARGEST, LARGEST]`; 1 where either
    maximum is 0 or not finite.
    """

    alpha: float = 0.5
    """0: all columns of the weight get one magnitude; 1: all channels of the activation do."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise OptionError(
                f"alpha must be between 0 and 1, not {self.alpha}: it is the share of the difficulty that "
                "moves from the activation into the weight. The usual value is 0.5."
            )

    def factors(self, absmax: Tensor, column_max: Tensor) -> Tensor:
        """The factors s, `[K]` fp32 on the CPU.

        Args:
            absmax: `[K]`, the largest magnitude of each input channel.
            column_max: `[K]`, the largest magnitude of each column among all weights that read the value.
        """
        x, weight = absmax.double().cpu(), column_max.double().cpu()
        known = (x > 0) & (weight > 0) & x.isfinite() & weight.isfinite()
        x, weight = (torch.where(known, each, torch.ones_like(each)) for each in (x, weight))
        factors = x.pow(self.alpha) / weight.pow(1 - self.alpha)
        return torch.where(known, factors.clamp(1 / LARGEST, LARGEST), torch.ones_like(x)).float()
