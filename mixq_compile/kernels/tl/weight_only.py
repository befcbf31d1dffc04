# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""`weight_only_linear`: a 16 or 32-bit activation times integer codes, read once, near the memory floor.

The codes are converted in registers to the activation's dtype, which holds them exactly. Long sums over
few outputs are split, and joined in a fixed order by a second launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    await_previous_launch,
    ceil_div,
    merges,
    multiprocessors,
    on_device,
    overlap,
    power_of_two,
    row_matrix,
    supports,
    tl,
    triton,
)
from mixq_compile.kernels.tl.unpacking import nibble_values
from mixq_compile.ops.providers import provider
from mixq_compile.ops.weight_codes import weight_bits

LARGEST_BLOCK_M = 64
"""Most rows of a tile; with more rows there are tiles enough, and sums are not split."""
BYTES_WORTH_SPLITTING = 512
"""A split sums over at least this many bytes of each weight row."""
MOST_SPLITS = 4
PROGRAMS_PER_MULTIPROCESSOR = 5


class Tile(NamedTuple):
    """Output features and weight bytes that a program takes at a time, and how it runs."""

    features: int
    length: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["rows"])
def _weight_only(
    x,  # [M, K]
    weight,  # [N, K] int8, or [N, ceil(K/2)] uint8
    weight_scale,  # [N] fp32
    bias,  # [N]
    out,  # [M, N], or where the sums are split their parts fp32 [splits, M, N]
    rows,
    features,
    columns,
    length,
    span,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
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
            low, high = nibble_values(held, x.dtype.element_ty, ASSEMBLY)
            column = 2 * start + tl.arange(0, 2 * BLOCK_K)
            values = tl.load(x_row + column[None, :], mask=row_mask & (column < columns)[None, :], other=0.0)
            even, odd = tl.split(tl.reshape(values, (BLOCK_M, BLOCK_K, 2)))
            total = tl.dot(low, tl.trans(even), total, input_precision="ieee")
            total = tl.dot(high, tl.trans(odd), total, input_precision="ieee")
        else:
            values = tl.load(x_row + byte[None, :], mask=row_mask & (byte < columns)[None, :], other=0.0)
            converted = held.to(x.dtype.element_ty)
            total = tl.dot(converted, tl.trans(values), total, input_precision="ieee")
    mask = feature_mask & (row < rows)[None, :]
    place = row.to(tl.int64)[None, :] * features + feature[:, None]
    if IS_SPLIT:
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
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
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


def choose_tile(rows: int, dtype: torch.dtype, bits: int) -> Tile:
    """The tile for so many rows; up to 32 two warps, as four take a slower way through Hopper's units."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    if rows <= 16:
        return Tile(32, 128, 2, 4) if bits == 8 else Tile(64, 128, 2, 3)
    if rows <= 32:
        return Tile(64, 64, 2, 6) if bits == 8 else Tile(64, 64, 2, 4)
    return Tile(128, 64, 4, 4)


def choose_splits(programs: int, length: int, bits: int, device: torch.device) -> int:
    """Into how many parts to split sums over so many bytes of a weight row, without it so many programs."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) // programs if bits == 8 else MOST_SPLITS
    most = max(1, min(wanted, length // BYTES_WORTH_SPLITTING, MOST_SPLITS))
    return power_of_two(most + 1, at_least=2) // 2


def launch(
    matrix: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out: Tensor,
    tile: Tile, splits: int,
) -> None:  # fmt: skip
    """Any number of rows, the sums over K in `splits` parts."""
    rows, columns = matrix.shape
    features, length = weight.shape
    block_m = min(LARGEST_BLOCK_M, power_of_two(rows))
    span = ceil_div(ceil_div(length, splits), tile.length) * tile.length
    target = out if splits == 1 else out.new_empty((splits, rows, features), dtype=torch.float32)
    enqueue(
        _weight_only, (ceil_div(features, tile.features), ceil_div(rows, block_m), splits),
        matrix, weight, weight_scale, bias, target, rows, features, columns, length, span,
        matrix.stride(0), weight.stride(0), HAS_BIAS=bias is not None, PACKED=weight_bits(weight) == 4,
        IS_SPLIT=splits > 1, BLOCK_M=block_m, BLOCK_N=tile.features, BLOCK_K=tile.length,
        num_warps=tile.warps, num_stages=tile.stages, ASSEMBLY=matrix.is_cuda, **overlap(matrix),
    )  # fmt: skip
    if splits > 1:
        enqueue(
            _join_parts, (ceil_div(features, 1024), rows),
            target, weight_scale, bias, out, rows, features,
            HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=1024, **overlap(matrix),
        )  # fmt: skip


@provider("weight_only_linear", name="tl", priority=PRIORITY, supports=supports, merges=merges)
def weight_only_linear(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Any number of rows; made for up to 32."""
    features, length = weight_codes.shape
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    matrix = row_matrix(x)
    rows = matrix.shape[0]
    if not out.numel():
        return out
    weight = row_matrix(weight_codes)
    bits = weight_bits(weight)
    tile = choose_tile(rows, x.dtype, bits)
    programs = ceil_div(features, tile.features) * ceil_div(rows, LARGEST_BLOCK_M)
    splits = choose_splits(programs, length, bits, x.device) if rows <= LARGEST_BLOCK_M else 1
    with on_device(x):
        launch(matrix, weight, weight_scale, bias, out, tile, splits)
    return out
