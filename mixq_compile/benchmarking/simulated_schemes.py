"""The product of one linear as published schemes round it: number formats alone, in fp32.

The formats are simulated, not the calibration: weights are rounded to nearest, where AWQ searches scales and
clips, GPTQ and QUIK feed errors back, and Atom clips. Their published errors are smaller than these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.area.linear_areas import ATOM_COLUMNS, QUIK_COLUMNS, LinearSize
from mixq_compile.formats import INT4, INT8, TensorFormat
from mixq_compile.weights import low_rank, rounding

BLOCK = 16
"""Numbers of one MXINT block, as many as lanes by default."""
SMOOTHING = 0.5
"""SmoothQuant's migration strength."""
SMALLEST = 1e-8
"""Magnitudes below this count as this where SmoothQuant divides by them."""
LARGEST_OF_16_BITS = 2**15 - 1


@dataclass(frozen=True)
class Problem:
    """One linear on the inputs that the model feeds it, in fp32."""

    x: Tensor
    """(rows, in)."""
    w: Tensor
    """(out, in)."""
    size: LinearSize
    threshold: float

    @property
    def outliers(self) -> Tensor:
        """Which columns of X have a magnitude above the threshold."""
        return self.x.abs().amax(0) >= self.threshold

    def largest_columns(self, count: int) -> Tensor:
        """Which columns of X have the largest magnitudes."""
        chosen = torch.zeros(self.x.shape[1], dtype=torch.bool, device=self.x.device)
        chosen[self.x.abs().amax(0).topk(min(count, len(chosen))).indices] = True
        return chosen


def _through(values: Tensor, fmt: TensorFormat) -> Tensor:
    """Numbers `[M, K]` rounded to a format and back."""
    return rounding.values(*rounding.rounded(values, fmt), fmt)


def _sixteen_bits(values: Tensor) -> Tensor:
    """Rounded to integers of 16 bits, one scale a row: LQER's factors, which no weight is stored in."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(rounding.EPSILON) / LARGEST_OF_16_BITS
    return (values / scale).round() * scale


def _split(problem: Problem, kept: Tensor, low: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The product of the columns that are kept exactly, and of the others through `low`."""
    inside = torch.where(kept, 0.0, problem.x), torch.where(kept, 0.0, problem.w)
    return low(*inside) + torch.where(kept, problem.x, 0.0) @ problem.w.T


def _llm_int(problem: Problem, fmt: TensorFormat) -> Tensor:
    return _split(problem, problem.outliers, lambda x, w: _through(x, fmt) @ _through(w, fmt).T)


def _quik(problem: Problem) -> Tensor:
    kept, affine = problem.largest_columns(QUIK_COLUMNS), TensorFormat(4, signed=False)
    return _split(problem, kept, lambda x, w: _through(x, affine) @ _through(w, INT4).T)


def _atom(problem: Problem) -> Tensor:
    kept, grouped = problem.largest_columns(ATOM_COLUMNS), TensorFormat(4, problem.size.group)
    x, w = problem.x, problem.w
    low = [_through(torch.where(kept, 0.0, values), grouped) for values in (x, w)]
    high = [_through(torch.where(kept, values, 0.0), INT8) for values in (x, w)]
    return low[0] @ low[1].T + high[0] @ high[1].T


def _smoothquant(problem: Problem) -> Tensor:
    reach_x, reach_w = (values.abs().amax(0).clamp_min(SMALLEST) for values in (problem.x, problem.w))
    scale = reach_x**SMOOTHING / reach_w ** (1 - SMOOTHING)
    return _through(problem.x / scale, INT8) @ _through(problem.w * scale, INT8).T


def _weight_only(problem: Problem) -> Tensor:
    return problem.x.half().float() @ _through(problem.w, TensorFormat(4, problem.size.group, signed=False)).T


def _low_rank(problem: Problem, weight: TensorFormat, high: Callable[[Tensor], Tensor]) -> Tensor:
    """L2QER: the error of W, weighted by the mean magnitudes of X, to low rank."""
    weights = _through(problem.w, weight)
    channels = low_rank.channel_weights(problem.x.abs().mean(0))
    left, right = low_rank.factors((problem.w - weights).T, problem.size.rank, channels)
    # Blocks and scales lie along the dimension that is summed over: in for A, the rank for B.
    a, b = high(left.T).T, high(right.T).T
    x = high(problem.x)
    return x @ weights.T + high(x @ a) @ b


def _mxint(bits: int) -> TensorFormat:
    return TensorFormat(bits, BLOCK, scale="power_of_two")


def _lqer_mxint(problem: Problem, bits: int) -> Tensor:
    return _low_rank(problem, _mxint(bits), lambda values: _through(values, _mxint(8)))


SIMULATED: dict[str, Callable[[Problem], Tensor]] = {
    "fp16": lambda problem: (problem.x.half().float() @ problem.w.half().float().T).half().float(),
    "smoothquant": _smoothquant,
    "llm_int8": lambda problem: _llm_int(problem, INT8),
    "llm_int4": lambda problem: _llm_int(problem, INT4),
    "quik": _quik,
    "atom": _atom,
    "awq": _weight_only,
    "gptq": _weight_only,
    "lqer_int8": lambda problem: _low_rank(problem, INT8, _sixteen_bits),
    "lqer_int4": lambda problem: _low_rank(problem, INT4, _sixteen_bits),
    "lqer_mxint4": lambda problem: _lqer_mxint(problem, 4),
    "lqer_mxint2": lambda problem: _lqer_mxint(problem, 2),
}
"""The product of a linear as each scheme rounds it."""
