"""`error_feedback`: columns are rounded one by one, and those to come make up for each one's error (GPTQ).

Source: Frantar et al., GPTQ (2022), algorithm 1. The second moment of the inputs says how: with U the upper
Cholesky factor of the inverse of XᵀX, an error e of column i, over U_ii, is taken from the columns behind it
in proportion to row i of U.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mixq_compile.errors import StatisticsError
from mixq_compile.formats import TensorFormat
from mixq_compile.weights import rounding
from mixq_compile.weights.solvers.registry import Solution

NEEDS: tuple[str, ...] = ("gram",)
JOINT = True
BLOCK = 128
"""Columns whose errors are fed back at once to all columns behind them."""
DAMPING = 0.01
"""Added to the diagonal, as a part of its mean: where it has little to say, errors stay where they are."""
MOST_DAMPING = 1.0


Scales = Callable[[Tensor, TensorFormat, Tensor], tuple[Tensor, Tensor | None]]
"""Scales and zero points of some columns `[N, k]`, whose inputs have these second moments `[k]`."""


def widest(columns: Tensor, fmt: TensorFormat, moments: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales that clip nothing."""
    return rounding.scale_of(*rounding.extremes(columns, fmt), fmt)


def solve(
    matrix: Tensor, fmt: TensorFormat, inputs: Mapping[str, Tensor], scales: Scales = widest
) -> Solution:
    """Codes, scales and zero points of a weight `[N, K]`, of which `gram` `[K, K]` weighs the errors.

    With one scale a row, the original weight's, the channels with the largest inputs come first, since those
    behind make up for them. Scales of groups are found when their first column comes, of what the columns
    before have left there. Columns that no input reaches are rounded to nearest. With `kept_columns` `[n]`
    those stay in 16 bit in every call: they come last, make up for all others, and are returned as they are
    then. Raises StatisticsError where the second moment is of another width, or not finite.
    """
    kept = inputs.get("kept_columns")
    if not bool(torch.isfinite(matrix).all()):  # whose NaN stays in its rows
        return Solution(*rounding.rounded(matrix, fmt), None if kept is None else matrix[:, kept])
    gram = _checked(inputs["gram"], matrix.shape[1]).to(matrix.device)
    if fmt.group is not None:
        if kept is not None:
            raise StatisticsError(f"columns are kept beside one scale a row, not beside {fmt}.")
        return _solve(matrix, fmt, gram, matrix.shape[1], scales)
    order = gram.diagonal().argsort(descending=True, stable=True)
    count = matrix.shape[1]
    if kept is not None:
        is_kept = torch.zeros(count, dtype=torch.bool, device=matrix.device)
        is_kept[kept.to(matrix.device)] = True
        order = torch.cat((order[~is_kept[order]], kept.to(order)))
        count -= len(kept)
    if not count:  # nothing is rounded that others could make up for
        return Solution(*rounding.rounded(matrix, fmt), matrix[:, kept])
    found = _solve(matrix[:, order], fmt, gram[order][:, order], count, scales)
    return found._replace(codes=found.codes[:, order.argsort()])


def _solve(matrix: Tensor, fmt: TensorFormat, gram: Tensor, columns: int, scales: Scales) -> Solution:
    """The first `columns` rounded one by one; those behind are kept, and rounded at the end as they are."""
    upper = _feedback(gram)
    moments = gram.diagonal()
    left = matrix.double()
    size = min(fmt.group or columns, columns)
    codes, found, zeros = [], [], []
    scale = zero = None
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros_like(left[:, start:end])
        for place in range(start, end):
            if place % size == 0:
                if place > start:  # what the columns of this block have left is not in those behind it yet
                    ahead = slice(end, max(end, place + size))
                    pending = errors[:, : place - start] @ upper[start:place, ahead]
                    group = torch.cat((left[:, place:end], left[:, ahead] - pending), dim=1)[:, :size]
                else:
                    group = left[:, place : place + size]
                scale, zero = scales(group.float(), _one(fmt), moments[place : place + size])
                found.append(scale)
                zeros.append(zero)
            assert scale is not None
            column = left[:, place : place + 1]
            code = rounding.codes_of(column.float(), scale, zero, _one(fmt))
            value = rounding.values(code, scale, zero, _one(fmt)).double()
            error = (column - value) / upper[place, place]
            left[:, place:end] -= error * upper[place, place:end]
            errors[:, place - start : place - start + 1] = error
            codes.append(code)
        left[:, end:] -= errors @ upper[start:end, end:]
    kept = left[:, columns:].float()
    if kept.shape[1]:
        assert scale is not None, "one scale a row"
        codes.append(rounding.codes_of(kept, scale, zero, _one(fmt)))
    shape = fmt.scale_shape(*matrix.shape)
    all_scales = torch.stack(found, dim=1).reshape(shape)
    all_zeros = None if fmt.signed else torch.stack([z for z in zeros if z is not None], dim=1).reshape(shape)
    return Solution(torch.cat(codes, dim=1), all_scales, all_zeros, kept if kept.shape[1] else None)


def _one(fmt: TensorFormat) -> TensorFormat:
    """The format of one group's columns, as a matrix of their own."""
    if fmt.scale == "power_of_two":
        return TensorFormat(fmt.bits, fmt.group, fmt.signed, fmt.scale)
    return TensorFormat(fmt.bits, None, fmt.signed)


def _checked(gram: Tensor, columns: int) -> Tensor:
    if tuple(gram.shape) != (columns, columns) or not bool(torch.isfinite(gram).all()):
        raise StatisticsError(
            f"the gram of a linear's inputs must be {columns} times {columns} finite numbers, and has the "
            f"shape {list(gram.shape)}: calibrate this model again."
        )
    return gram


def _feedback(gram: Tensor) -> Tensor:
    """U `[K, K]`, upper, float64: `(XᵀX + damping)⁻¹ = Uᵀ U`."""
    moment = gram.double()
    diagonal = moment.diagonal()
    silent = diagonal <= 0
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    damping = DAMPING
    while True:
        damped = moment + torch.diag(torch.where(silent, mean, mean * damping))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
        if damping >= MOST_DAMPING:
            raise StatisticsError(
                "the gram of a linear's inputs is no second moment, even with its mean added to the "
                "diagonal: calibrate this model again."
            )
        damping *= 10
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper
