"""What the circuits in `rtl` compute, in numpy, bit by bit.

Numbers of floating point are bit patterns in integer arrays. Subnormals are read as zero, and results below
the least normal number become zero, as the circuits' headers say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

FP16_NAN, FP32_NAN = 0x7E00, 0x7FC00000
LEAST_NORMAL = 2.0**-14
LEAST_NORMAL_FP32 = 2.0**-126
SIGNIFICAND = 11


def signed(values: Bits, bits: int) -> Bits:
    """Bit patterns as two's complement."""
    return np.where(values >> (bits - 1) & 1, values - (1 << bits), values)


def pattern(values: Any, bits: int) -> Bits:
    """Integers as patterns of so many bits."""
    return np.asarray(values, np.int64) & ((1 << bits) - 1)


def half(bits: Bits) -> Reals:
    """The values of fp16 patterns, without subnormals."""
    values = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return np.where(np.abs(values) < LEAST_NORMAL, np.copysign(0.0, values), values)


def ordinary(bits: Bits) -> Reals:
    """The values of fp16 patterns with the exponent 31 read like any other one."""
    exponent = bits >> 10 & 31
    magnitude = np.ldexp(1.0 + (bits & 1023) / 1024.0, (exponent - 15).astype(np.int32))
    return np.where(bits >> 15, -1.0, 1.0) * np.where(exponent == 0, 0.0, magnitude)


def rounded(values: Reals) -> Reals:
    """Rounded to eleven bits with an unbounded exponent, ties to even."""
    mantissas, exponents = np.frexp(values)
    near: Reals = np.ldexp(np.rint(np.ldexp(mantissas, SIGNIFICAND)), exponents - SIGNIFICAND)
    return near


def to_half(values: Reals) -> Bits:
    """Exact values as fp16 patterns."""
    near = rounded(values)
    near = np.where(np.abs(near) < LEAST_NORMAL, np.copysign(0.0, near), near)
    with np.errstate(over="ignore"):
        bits = near.astype(np.float16).view(np.uint16).astype(np.int64)
    return np.where(np.isnan(values), FP16_NAN, bits)


def multiply(a: Bits, b: Bits) -> Bits:
    """Products of fp16; of two significands float64 is exact."""
    with np.errstate(invalid="ignore"):
        return to_half(half(a) * half(b))


def add(a: Bits, b: Bits) -> Bits:
    """Sums of fp16, which float64 holds exactly."""
    with np.errstate(invalid="ignore"):
        return to_half(half(a) + half(b))


def single(bits: Bits) -> npt.NDArray[np.float32]:
    """The values of fp32 patterns, without subnormals."""
    values = bits.astype(np.uint32).view(np.float32)
    return np.where(np.abs(values) < LEAST_NORMAL_FP32, np.copysign(np.float32(0.0), values), values)


def add_single(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Bits:
    """Sums of fp32 as patterns. Subnormal sums are exact, so that flushing them after rounding is enough."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = a + b
    total = np.where(np.abs(total) < LEAST_NORMAL_FP32, np.copysign(np.float32(0.0), total), total)
    bits = total.astype(np.float32).view(np.uint32).astype(np.int64)
    return np.where(np.isnan(total), FP32_NAN, bits)


def multiply_add_single(a: Bits, b: Bits, c: Bits) -> Bits:
    """a * b + c with fp16 factors and an fp32 sum."""
    with np.errstate(invalid="ignore"):
        product = (half(a) * half(b)).astype(np.float32)
    return add_single(product, single(c))


def to_integer(x: Bits, bits: int) -> Bits:
    """fp16 to integers with saturation; NaN saturates by its sign."""
    values = half(x)
    values = np.where(np.isnan(values), np.where(x >> 15, -np.inf, np.inf), values)
    return pattern(np.clip(np.rint(values), -(1 << (bits - 1)), (1 << (bits - 1)) - 1), bits)


def dequantize(q: Bits, zero: Bits, scale: Bits, bits: int, asymmetric: bool) -> Bits:
    """(q - zero) * scale; a scale that is no number counts as one above the range."""
    difference = q - zero if asymmetric else signed(q, bits)
    return to_half(difference * ordinary(scale))


def gather(x: Bits, scale: Bits, y: Bits, bits: int) -> Bits:
    """x * scale + y with an integer x."""
    with np.errstate(invalid="ignore"):
        return add(to_half(rounded(signed(x, bits).astype(np.float64)) * half(scale)), y)


def shared_exponent(x: Bits) -> Bits:
    """The largest exponent of each row of fp16."""
    largest: Bits = (x >> 10 & 31).max(axis=1, keepdims=True)
    return largest


def mantissas(x: Bits, bits: int) -> Bits:
    """Rows of fp16 as mantissas under their largest exponent, ties away from zero."""
    unit = np.ldexp(1.0, (shared_exponent(x) - 15 - (bits - 2)).astype(np.int32))
    magnitude = np.minimum(np.floor(np.abs(ordinary(x)) / unit + 0.5), (1 << (bits - 1)) - 1)
    return pattern(np.where(x >> 15, -magnitude, magnitude), bits)


def half_tree(x: Bits) -> Bits:
    """The sum of each row of fp16 by a balanced tree."""
    if x.shape[1] == 1:
        return x
    middle = (x.shape[1] + 1) // 2
    return add(half_tree(x[:, :middle]), half_tree(x[:, middle:]))


def running(first: Bits, terms: Sequence[Any], combine: Any, start: Any) -> list[Any]:
    """The running sums of `terms` after each cycle; `first` starts a new one."""
    total, found = start, []
    for starts, term in zip(first[:, 0], terms, strict=True):
        total = combine(start if starts else total, term)
        found.append(total)
    return found


def half_dot(first: Bits, w: Bits, x: Bits) -> Bits:
    """The running sums of products of rows of fp16."""
    partial = half_tree(multiply(w, x))
    return np.stack(running(first, list(partial), add, np.zeros(1, np.int64)))


def fixed_dot(first: Bits, w: Bits, x: Bits, widths: tuple[int, int, int]) -> Bits:
    """The running sums of products of rows of integers; widths of w, of x, of the sum."""
    terms = (signed(w, widths[0]) * signed(x, widths[1])).sum(axis=1)
    sums = running(first, terms.tolist(), lambda total, term: total + term, 0)
    return pattern(sums, widths[2])[:, None]


def block_dot(
    first: Bits, w: Bits, x: Bits, exponents: Bits, widths: tuple[int, int, int]
) -> tuple[Bits, Bits]:
    """The running sums of blocks with exponents: mantissas and exponents."""
    terms = (signed(w, widths[0]) * signed(x, widths[1])).sum(axis=1).tolist()

    def combine(total: tuple[int, int] | None, term: tuple[int, int]) -> tuple[int, int]:
        if total is None:
            return term
        larger = max(total[1], term[1])
        return (total[0] >> larger - total[1]) + (term[0] >> larger - term[1]), larger

    pairs = list(zip(terms, exponents[:, 0].tolist(), strict=True))
    sums = running(first, pairs, combine, None)
    return pattern([one[0] for one in sums], widths[2])[:, None], pattern([one[1] for one in sums], 9)[
        :, None
    ]
