"""What the numbers of each format mean: the specification, in plain torch on fp32 or fp64.

A matrix `[N, K]` has a scale for each row or for each group of columns of a row, the last of which may be
short. Codes here are one an element, int8 or, where they count from 0, uint8; `packing` packs them.

- `int`: `value = code * scale`, with `scale = largest magnitude / largest code`.
- `uint`: `value = (code - zero) * scale`, with `scale = (max - min) / largest code` and an integer zero
  point from 0 to the largest code; the range always includes 0, which therefore is exact.
- `mxint` of width w: `value = code * 2^(e - (w - 1))`, with the shared exponent
  `e = clamp(ceil(log2 largest magnitude), -127, 128)` held as the byte `e + 127`. Codes are sign and
  magnitude: `-(2^(w-1) - 1)` to `2^(w-1) - 1`, ternary at width 2.

All round half to even. A row or group of `int` or `uint` with a value that is not finite has a scale that is
not finite, so that all its values are NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.formats import TensorFormat

EPSILON = 2.0**-96
"""A largest magnitude below this counts as this, so that no scale is zero."""
EXPONENTS = (-127, 128)
EXPONENT_BIAS = 127


def rounded(matrix: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """The nearest codes `[N, K]` of a matrix, with scales from its extremes; nothing is clipped.

    Scales have the matrix's dtype or, as shared exponents, uint8; they and the zero points, uint8 and only of
    a format without a sign, are `[N]` or `[N, G]`. Raises MixqError where a shared exponent cannot stand for
    a value that is not finite.
    """
    scale, zero = scale_of(*extremes(matrix, fmt), fmt)
    return codes_of(matrix, scale, zero, fmt), scale, zero


def values(
    codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: TensorFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The numbers `[N, K]` that codes `[N, K]` (not packed), scales and zero points stand for."""
    grouped = _grouped(centred(codes, zero, fmt).to(dtype), fmt) * _steps(scale, fmt, dtype)
    return _matrix(grouped, codes.shape[1])


def centred(codes: Tensor, zero: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Codes `[N, K]` less their zero points, int16: what an integer product sums up; as given without one."""
    if zero is None:
        return codes
    zeros = zero.reshape(zero.shape[0], -1, 1).to(torch.int16)
    return _matrix(_grouped(codes.to(torch.int16), fmt) - zeros, codes.shape[1])


def code_sums(codes: Tensor, zero: Tensor | None, fmt: TensorFormat) -> Tensor:
    """The sum of each scale's codes less their zero point: int32, of the scales' shape."""
    sums = _grouped(centred(codes, zero, fmt), fmt).sum(dim=-1, dtype=torch.int32)
    return sums.reshape(fmt.scale_shape(*codes.shape))


def extremes(matrix: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """The range of each scale, of the scales' shape: it includes 0, and with a sign lies evenly around it."""
    grouped = _grouped(matrix, fmt)
    shape = fmt.scale_shape(*matrix.shape)
    if not fmt.signed:
        low, high = grouped.amin(dim=-1).clamp_max(0), grouped.amax(dim=-1).clamp_min(EPSILON)
        return low.reshape(shape), high.reshape(shape)
    smallest = 2.0 ** EXPONENTS[0] if fmt.scale == "power_of_two" else EPSILON
    high = grouped.abs().amax(dim=-1).clamp_min(smallest).reshape(shape)
    return -high, high


def scale_of(low: Tensor, high: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor | None]:
    """The scales of these ranges, and their zero points where the format has some."""
    if fmt.scale == "power_of_two":
        return _exponents(high), None
    # A tensor, because GPUs divide by a number through its reciprocal, with another last bit.
    largest_codes = torch.full_like(high, fmt.largest_code)
    if fmt.signed:
        return high / largest_codes, None
    scale = (high - low) / largest_codes
    return scale, torch.round(-low / scale).clamp_(0, fmt.largest_code).to(torch.uint8)


def steps(scale: Tensor, fmt: TensorFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """How far apart the values of neighbouring codes are, `[N, G]`; G = 1 where a row has one scale."""
    by_group = scale.reshape(scale.shape[0], -1)
    if fmt.scale != "power_of_two":
        return by_group.to(dtype)
    # The bits of a float64, because functions that raise 2 to a power need not be exact.
    exponent = by_group.to(torch.int64) - EXPONENT_BIAS - (fmt.bits - 1)
    return ((exponent + 1023) << 52).view(torch.float64).to(dtype)


def codes_of(matrix: Tensor, scale: Tensor, zero: Tensor | None, fmt: TensorFormat) -> Tensor:
    """The nearest codes `[N, K]` of a matrix at these scales and zero points."""
    codes = _matrix(_float_codes(matrix, scale, zero, fmt), matrix.shape[1])
    return codes.to(torch.int8 if fmt.signed else torch.uint8)


def squared_error(
    matrix: Tensor, scale: Tensor, zero: Tensor | None, fmt: TensorFormat, moments: Tensor | None = None
) -> Tensor:
    """The sum of squared errors under each scale, of the scales' shape; `moments` `[K]` weigh columns."""
    codes = _float_codes(matrix, scale, zero, fmt)
    if zero is not None:
        codes -= _column(zero, codes.dtype)
    difference = codes * _steps(scale, fmt, matrix.dtype) - _grouped(matrix, fmt)
    errors = difference.square_()
    if moments is not None:
        errors *= _grouped(moments[None].to(errors.dtype), fmt)
    return errors.sum(dim=-1).reshape(scale.shape)


def _float_codes(matrix: Tensor, scale: Tensor, zero: Tensor | None, fmt: TensorFormat) -> Tensor:
    codes = torch.round(_grouped(matrix, fmt) / _steps(scale, fmt, matrix.dtype))
    if zero is not None:
        codes += _column(zero, codes.dtype)
    return codes.clamp_(fmt.lowest_code, fmt.largest_code)


def _grouped(matrix: Tensor, fmt: TensorFormat) -> Tensor:
    """The columns of each scale, `[N, G, columns]`; zeros fill up a last group that is short."""
    rows, columns = matrix.shape
    groups = fmt.groups(columns)
    size = min(fmt.group or columns, columns)
    if groups * size != columns:
        matrix = torch.nn.functional.pad(matrix, (0, groups * size - columns))
    return matrix.reshape(rows, groups, size)


def _matrix(grouped: Tensor, columns: int) -> Tensor:
    return grouped.reshape(grouped.shape[0], grouped.shape[1] * grouped.shape[2])[:, :columns]


def _column(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).reshape(tensor.shape[0], -1, 1)


def _exponents(largest: Tensor) -> Tensor:
    """`ceil(log2 largest)` as bytes: exactly, where a logarithm in floating point would be rounded."""
    if not largest.is_meta and not bool(torch.isfinite(largest).all()):
        raise MixqError(
            "a value that is not finite has no shared exponent: mxint formats cannot hold a weight with NaN "
            "or infinity. Repair the weight, or leave this layer in 16 bit."
        )
    mantissa, exponent = torch.frexp(largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return (exponent.clamp(*EXPONENTS) + EXPONENT_BIAS).to(torch.uint8)


def _steps(scale: Tensor, fmt: TensorFormat, dtype: torch.dtype) -> Tensor:
    return steps(scale, fmt, dtype)[..., None]
