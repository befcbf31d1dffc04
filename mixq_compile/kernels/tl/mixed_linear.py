# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,no-any-return"
"""`mixed_linear`: the integer product, its scales, the outlier product and the bias in one kernel.

The int32 accumulator becomes fp32 in place (never fp16: sums beyond 65504 would be lost), is scaled,
and the 16-bit outlier columns accumulate onto it, as many as the device-side count says. Three
variants: `hopper` for what it supports, tensor descriptors on other GPUs that have them, plain pointers
for the rest (fp32, strides that are no multiple of 16 bytes). A 4-bit weight is unpacked before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixq_compile.kernels.tl import hopper, measured
from mixq_compile.kernels.tl.hopper_tiles import choose_tile
from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.tiles import TILES_PER_GROUP, integer_tile, outlier_tile, tile_place
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    TRITON_PROBLEM,
    await_previous_launch,
    capability,
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
from mixq_compile.kernels.tl.unpacking import eight_bit_codes
from mixq_compile.kernels.tl.weight_only import weight_only_linear
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch

if TRITON_PROBLEM is None:
    from triton.tools.tensor_descriptor import TensorDescriptor

OUTLIER_BLOCK = 64
DESCRIBING = (9, 10)
"""Major compute capabilities that have tensor descriptors, and shared memory for tiles worth them."""
_COUNT, _GROUP = tl.constexpr(COUNT), tl.constexpr(TILES_PER_GROUP)


class Tile(NamedTuple):
    """Rows, columns and depth of a program's tile, and how it runs."""

    rows: int
    features: int
    depth: int
    warps: int
    stages: int


@triton.jit
def _finish(result, bias, feature, features, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit(do_not_specialize=["rows"])
def _through_pointers(
    codes,  # [M, K] int8
    scale,  # [M] fp32
    outliers,  # [M, C]
    count,  # [1] int32
    weight,  # [N, K] int8
    weight_scale,  # [N] fp32
    outlier_weight,  # [N, C]
    bias,  # [N]
    out,  # [M, N]
    rows,
    features,
    columns,
    slots,
    codes_stride,
    weight_stride,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    down, across = tile_place(tl.program_id(0), row_tiles, column_tiles, _GROUP)
    row = down * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = across * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = integer_tile(
        codes, weight, row, feature, rows, features, columns, codes_stride, weight_stride,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row_scale = tl.load(scale + row, mask=row < rows, other=0.0)
    feature_scale = tl.load(weight_scale + feature, mask=feature < features, other=0.0)
    result = accumulator.to(tl.float32) * row_scale[:, None] * feature_scale[None, :]
    if HAS_SLOTS:
        used = tl.load(count + _COUNT)
        result = outlier_tile(
            result, outliers, outlier_weight, row, feature, rows, features, slots, used, BLOCK_O
        )
    result = _finish(result, bias, feature, features, HAS_BIAS)
    target = out + row.to(tl.int64)[:, None] * features + feature[None, :]
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _through_descriptors(
    codes,  # [M, K] int8
    scale,  # [M] fp32
    outliers,  # [M, C]
    count,  # [1] int32
    weight,  # [N, K] int8
    weight_scale,  # [N] fp32
    outlier_weight,  # [N, C]
    bias,  # [N]
    out,  # [M, N], stored in halves of a tile
    rows,
    features,
    columns,
    HAS_SLOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    used = tl.load(count + _COUNT)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        down, across = tile_place(tile, row_tiles, column_tiles, _GROUP)
        first_row, first_feature = down * BLOCK_M, across * BLOCK_N
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for start in range(0, columns, BLOCK_K):
            left = codes.load([first_row, start])
            right = weight.load([first_feature, start])
            accumulator = tl.dot(left, right.T, accumulator, out_dtype=tl.int32)
        row = first_row + tl.arange(0, BLOCK_M)
        feature = first_feature + tl.arange(0, BLOCK_N)
        row_scale = tl.load(scale + row, mask=row < rows, other=0.0)
        feature_scale = tl.load(weight_scale + feature, mask=feature < features, other=0.0)
        result = accumulator.to(tl.float32) * row_scale[:, None] * feature_scale[None, :]
        if HAS_SLOTS:
            for start in range(0, used, BLOCK_O):
                left = outliers.load([first_row, start])
                right = outlier_weight.load([first_feature, start])
                result = tl.dot(left, right.T, result)
        result = _finish(result, bias, feature, features, HAS_BIAS)
        halves = tl.permute(tl.reshape(result, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left_half, right_half = tl.split(halves)
        out.store([first_row, first_feature], left_half.to(DTYPE))
        out.store([first_row, first_feature + BLOCK_N // 2], right_half.to(DTYPE))


def pointer_tile(rows: int, dtype: torch.dtype) -> Tile:
    """The tile of the plain-pointer variant."""
    if dtype == torch.float32:
        return Tile(32, 32, 64, 4, 2)
    if rows <= 64:
        return Tile(power_of_two(rows), 64, 128, 4, 4)
    return Tile(64, 128, 128, 4, 3) if rows <= 256 else Tile(128, 128, 128, 8, 3)


def descriptor_tile(rows: int) -> Tile:
    """The tile of the descriptor variant."""
    return Tile(64, 64, 128, 4, 4) if rows <= 64 else Tile(128, 128, 128, 8, 4)


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def describable(codes: Tensor, outliers: Tensor, weight: Tensor, outlier_weight: Tensor, out: Tensor) -> bool:
    """Whether tensor descriptors can address every matrix."""
    matrices = [codes, weight, out] + ([outliers, outlier_weight] if outliers.shape[1] else [])
    return all(_aligned(matrix) for matrix in matrices)


def launch_pointers(
    codes: Tensor, scale: Tensor, outliers: Tensor, count: Tensor, weight: Tensor, weight_scale: Tensor,
    outlier_weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile,
) -> None:  # fmt: skip
    """The variant that takes every call."""
    (rows, columns), features, slots = codes.shape, weight.shape[0], outliers.shape[1]
    enqueue(
        _through_pointers, (ceil_div(rows, tile.rows) * ceil_div(features, tile.features),),
        codes, scale, outliers, count, weight, weight_scale, outlier_weight, bias, out,
        rows, features, columns, slots, codes.stride(0), weight.stride(0),
        HAS_SLOTS=slots > 0, HAS_BIAS=bias is not None,
        BLOCK_M=tile.rows, BLOCK_N=tile.features, BLOCK_K=tile.depth, BLOCK_O=16 if slots <= 16 else 32,
        num_warps=tile.warps, num_stages=tile.stages, **overlap(codes),
    )  # fmt: skip


def launch_descriptors(
    codes: Tensor, scale: Tensor, outliers: Tensor, count: Tensor, weight: Tensor, weight_scale: Tensor,
    outlier_weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile,
) -> None:  # fmt: skip
    """The variant with tensor descriptors; every matrix must be `describable`."""
    (rows, columns), features, slots = codes.shape, weight.shape[0], outliers.shape[1]
    tiles = ceil_div(rows, tile.rows) * ceil_div(features, tile.features)
    describe = TensorDescriptor.from_tensor
    with_slots = slots > 0
    enqueue(
        _through_descriptors, (min(tiles, multiprocessors(codes.device)),),
        describe(codes, [tile.rows, tile.depth]), scale,
        describe(outliers, [tile.rows, OUTLIER_BLOCK]) if with_slots else None, count,
        describe(weight, [tile.features, tile.depth]), weight_scale,
        describe(outlier_weight, [tile.features, OUTLIER_BLOCK]) if with_slots else None, bias,
        describe(out, [tile.rows, tile.features // 2]), rows, features, columns,
        HAS_SLOTS=with_slots, HAS_BIAS=bias is not None,
        BLOCK_M=tile.rows, BLOCK_N=tile.features, BLOCK_K=tile.depth, BLOCK_O=OUTLIER_BLOCK,
        DTYPE={torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[out.dtype],
        num_warps=tile.warps, num_stages=tile.stages, **overlap(codes),
    )  # fmt: skip


@provider(
    "mixed_linear", name="tl", priority=PRIORITY, supports=supports, speedup=measured.speedup,
    small_batch=measured.small_batch, merges=merges,
)  # fmt: skip
def mixed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    small_m: int,
) -> Tensor:
    """The fastest variant that takes the call; at most `small_m` rows take the weight-only kernels."""
    if is_small_batch(codes, small_m) or not codes.numel():
        return weight_only_linear(x, weight_codes, weight_scale, bias)
    code_rows = row_matrix(codes)
    (rows, columns), (features, slots) = code_rows.shape, outlier_weight.shape
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    matrix, outlier_rows = out.view(rows, features), outliers.reshape(rows, slots)
    with on_device(x):
        weight = eight_bit_codes(row_matrix(weight_codes), columns)
        arguments = (
            code_rows, scale.reshape(rows), outlier_rows, count, weight, weight_scale, outlier_weight, bias,
            matrix,
        )  # fmt: skip
        describes = x.is_cuda and capability(x.device)[0] in DESCRIBING and x.dtype != torch.float32
        if not (describes and describable(code_rows, outlier_rows, weight, outlier_weight, matrix)):
            launch_pointers(*arguments, pointer_tile(rows, x.dtype))
        elif hopper.available(x.device):
            hopper.launch(*arguments, choose_tile(rows, features, multiprocessors(x.device)))
        else:
            launch_descriptors(*arguments, descriptor_tile(rows))
    return out
