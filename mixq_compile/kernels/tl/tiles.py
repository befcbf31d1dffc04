# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Parts of the matrix kernels: the order of output tiles, and the products of one tile through pointers."""

from __future__ import annotations

from mixq_compile.kernels.tl.toolkit import tl, triton

TILES_PER_GROUP = 8
"""Rows of tiles taken together, so that a wave reads few different weight tiles."""


@triton.jit
def tile_place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile, counting down groups of GROUP rows of tiles."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + (tile % per_group) % height, (tile % per_group) // height


@triton.jit
def integer_tile(
    codes, weight, row, feature, rows, features, columns, codes_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int32 `[BLOCK_M, BLOCK_N]`: codes times weight codes over all columns."""
    codes_row = codes + row.to(tl.int64)[:, None] * codes_stride
    weight_row = weight + feature.to(tl.int64)[:, None] * weight_stride
    row_mask, feature_mask = (row < rows)[:, None], (feature < features)[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, columns, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        left = tl.load(codes_row + column[None, :], mask=row_mask & (column < columns)[None, :], other=0)
        mask = feature_mask & (column < columns)[None, :]
        right = tl.load(weight_row + column[None, :], mask=mask, other=0)
        accumulator = tl.dot(left, tl.trans(right), accumulator, out_dtype=tl.int32)
    return accumulator


@triton.jit
def outlier_tile(
    accumulator, outliers, outlier_weight, row, feature, rows, features, slots, used,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Adds to fp32 accumulator `[BLOCK_M, BLOCK_N]` the product of the outlier slots in use."""
    left_row = outliers + row.to(tl.int64)[:, None] * slots
    right_row = outlier_weight + feature.to(tl.int64)[:, None] * slots
    for start in range(0, used, BLOCK_O):
        slot = start + tl.arange(0, BLOCK_O)
        mask = (slot < used)[None, :]
        left = tl.load(left_row + slot[None, :], mask=(row < rows)[:, None] & mask, other=0.0)
        right = tl.load(right_row + slot[None, :], mask=(feature < features)[:, None] & mask, other=0.0)
        accumulator = tl.dot(left, tl.trans(right), accumulator, input_precision="ieee")
    return accumulator
