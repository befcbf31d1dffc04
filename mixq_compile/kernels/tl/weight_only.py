"""`weight_only_linear`: a 16 or 32-bit activation times integer codes, read once, near the memory floor.

One row is summed on the ordinary units, each weight code used as it is loaded; more rows go through the
tensor cores, the codes converted in registers to the activation's dtype, which holds them exactly. Long sums over few outputs are split, and joined in a fixed order by a second launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixq_compile.kernels.tl.tiles import unpack_nibbles
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    ceil_div,
    multiprocessors,
    on_device,
    power_of_two,
    row_matrix,
    supports,
    tl,
    triton,
)
from mixq_compile.ops.providers import provider
from mixq_compile.ops.weight_codes import weight_bits

LARGEST_BLOCK_M = 64
BYTES_WORTH_SPLITTING = 1024
"""A split sums over at least this many bytes of each weight row."""
PROGRAMS_PER_MULTIPROCESSOR = 4


class VectorTile(NamedTuple):
    """Output features and weight bytes a program takes at a time, for one row."""

    features: int
    length: int
    warps: int


class MatrixTile(NamedTuple):
    """Output features and weight bytes a program takes at a time, and its pipeline."""

    features: int
    length: int
    warps: int
    stages: int


@triton.jit
def _one_row(
    x,  # [K]
    weight,  # [N, K] int8, or [N, ceil(K/2)] uint8
    weight_scale,  # [N] fp32
    bias,  # [N]
    out,  # [N]
    features,
    columns,
    length,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature_mask = feature < features
    weight_row = weight + feature.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    # Told that only so many elements are contiguous, Triton gives x and the weight one layout (16 bytes
    # of x a thread), and neither has to pass through shared memory.
    block = tl.max_contiguous(tl.arange(0, BLOCK_K), 4 if PACKED else 8)
    for start in range(0, length, BLOCK_K):
        byte = (start + block)[None, :]
        held = tl.load(weight_row + byte, mask=feature_mask[:, None] & (byte < length), other=0)
        if PACKED:
            low, high = unpack_nibbles(held)
            column = (2 * start + tl.arange(0, 2 * BLOCK_K))[None, :]
            values = tl.load(x + column, mask=column < columns, other=0.0)
            even, odd = tl.split(tl.reshape(values, (1, BLOCK_K, 2)))
            total += even.to(tl.float32) * low.to(tl.float32) + odd.to(tl.float32) * high.to(tl.float32)
        else:
            values = tl.load(x + byte, mask=byte < columns, other=0.0)
            total += values.to(tl.float32) * held.to(tl.float32)
    result = tl.sum(total, axis=1) * tl.load(weight_scale + feature, mask=feature_mask, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=feature_mask, other=0.0).to(tl.float32)
    tl.store(out + feature, result.to(out.dtype.element_ty), mask=feature_mask)


@triton.jit(do_not_specialize=["rows"])
def _many_rows(
    x,  # [M, K]
    weight,  # [N, K] int8, or [N, ceil(K/2)] uint8
    weight_scale,  # [N] fp32
    bias,  # [N]
    out,  # [M, N], or with SPLITS > 1 the parts fp32 [SPLITS, M, N]
    rows,
    features,
    columns,
    length,
    span,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    weight_row = weight + feature.to(tl.int64)[:, None] * weight_stride
    row_mask, feature_mask = (row < rows)[:, None], (feature < features)[:, None]
    # The weight is the left operand, which the tensor cores can take from registers.
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, length), BLOCK_K):
        byte = start + tl.arange(0, BLOCK_K)
        mask = feature_mask & (byte < length)[None, :]
        held = tl.load(weight_row + byte[None, :], mask=mask, other=0)
        if PACKED:
            low, high = unpack_nibbles(held)
            column = 2 * start + tl.arange(0, 2 * BLOCK_K)
            values = tl.load(x_row + column[None, :], mask=row_mask & (column < columns)[None, :], other=0.0)
            even, odd = tl.split(tl.reshape(values, (BLOCK_M, BLOCK_K, 2)))
            total = tl.dot(low.to(x.dtype.element_ty), tl.trans(even), total, input_precision="ieee")
            total = tl.dot(high.to(x.dtype.element_ty), tl.trans(odd), total, input_precision="ieee")
        else:
            values = tl.load(x_row + byte[None, :], mask=row_mask & (byte < columns)[None, :], other=0.0)
            converted = held.to(x.dtype.element_ty)
            total = tl.dot(converted, tl.trans(values), total, input_precision="ieee")
    mask = feature_mask & (row < rows)[None, :]
    place = row.to(tl.int64)[None, :] * features + feature[:, None]
    if SPLITS > 1:
        part = split.to(tl.int64) * rows * features
        tl.store(out + part + place, total, mask=mask)
    else:
        result = total * tl.load(weight_scale + feature, mask=feature < features, other=0.0)[:, None]
        if HAS_BIAS:
            result += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[:, None]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _join_parts(
    parts,  # [SPLITS, M, N] fp32
    weight_scale,  # [N] fp32
    bias,  # [N]
    out,  # [M, N]
    rows,
    features,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = feature < features
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * rows + row) * features + feature, mask=mask, other=0.0)
    total *= tl.load(weight_scale + feature, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * features + feature, total.to(out.dtype.element_ty), mask=mask)


def _vector_tile(length: int) -> VectorTile:
    return VectorTile(4, min(1024, power_of_two(length)), 4)


def _matrix_tile(rows: int, wide: bool) -> MatrixTile:
    if wide:
        return MatrixTile(32, 32, 4, 2)
    return MatrixTile(64, 128, 4, 4) if rows <= 32 else MatrixTile(128, 64, 4, 4)


def _splits(programs: int, length: int, device: torch.device) -> int:
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) // max(programs, 1)
    return max(1, min(wanted, length // BYTES_WORTH_SPLITTING, 8))


def launch_one_row(
    matrix: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor, tile: VectorTile
) -> None:
    """One row; every program sums whole weight rows."""
    features, length = weight.shape
    _one_row[(ceil_div(features, tile.features),)](
        matrix, weight, weight_scale, bias, out, features, matrix.shape[1], length, weight.stride(0),
        HAS_BIAS=bias is not None, PACKED=weight_bits(weight) == 4,
        BLOCK_N=tile.features, BLOCK_K=tile.length, num_warps=tile.warps,
    )  # fmt: skip


def launch_many_rows(
    matrix: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor,
    tile: MatrixTile, splits: int,
) -> None:  # fmt: skip
    """Any number of rows, the sums over K in `splits` parts."""
    rows, columns = matrix.shape
    features, length = weight.shape
    block_m = min(LARGEST_BLOCK_M, power_of_two(rows))
    span = ceil_div(ceil_div(length, splits), tile.length) * tile.length
    target = out if splits == 1 else out.new_empty((splits, rows, features), dtype=torch.float32)
    _many_rows[(ceil_div(features, tile.features), ceil_div(rows, block_m), splits)](
        matrix, weight, weight_scale, bias, target, rows, features, columns, length, span,
        matrix.stride(0), weight.stride(0), HAS_BIAS=bias is not None, PACKED=weight_bits(weight) == 4,
        SPLITS=splits, BLOCK_M=block_m, BLOCK_N=tile.features, BLOCK_K=tile.length,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        _join_parts[(ceil_div(features, 1024), rows)](
            target, weight_scale, bias, out, rows, features,
            HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=1024,
        )  # fmt: skip


@provider("weight_only_linear", name="tl", priority=PRIORITY, supports=supports)
def weight_only_linear(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """One row is summed on the ordinary units, more go through the tensor cores."""
    features, length = weight_codes.shape
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    matrix = row_matrix(x)
    rows = matrix.shape[0]
    if not out.numel():
        return out
    weight = row_matrix(weight_codes)
    with on_device(x):
        if rows == 1:
            launch_one_row(matrix, weight, weight_scale, bias, out, _vector_tile(length))
        else:
            tile = _matrix_tile(rows, wide=x.dtype == torch.float32)
            programs = ceil_div(features, tile.features) * ceil_div(rows, LARGEST_BLOCK_M)
            splits = _splits(programs, length, x.device)
            launch_many_rows(matrix, weight, weight_scale, bias, out, tile, splits)
    return out
