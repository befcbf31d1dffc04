# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""`mixed_gemm` and `dequantize`: the two halves of `mixed_linear`, unfused. For checking, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.tiles import TILES_PER_GROUP, integer_tile, outlier_tile, tile_place
from mixq_compile.kernels.tl.toolkit import PRIORITY, ceil_div, on_device, row_matrix, supports, tl, triton
from mixq_compile.kernels.tl.unpacking import eight_bit_codes
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import provider

BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_O = 32, 32, 64, 16
ELEMENTS = 1024
_COUNT, _GROUP = tl.constexpr(COUNT), tl.constexpr(TILES_PER_GROUP)


@triton.jit(do_not_specialize=["rows"])
def _both_products(
    codes,  # [M, K] int8
    outliers,  # [M, C]
    count,  # [1] int32
    weight,  # [N, K] int8
    outlier_weight,  # [N, C]
    accumulator,  # [M, N] int32
    outlier_product,  # [M, N] fp32
    rows,
    features,
    columns,
    slots,
    codes_stride,
    weight_stride,
    HAS_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    down, across = tile_place(tl.program_id(0), row_tiles, column_tiles, _GROUP)
    row = down * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = across * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    place = row.to(tl.int64)[:, None] * features + feature[None, :]
    sums = integer_tile(
        codes, weight, row, feature, rows, features, columns, codes_stride, weight_stride,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(accumulator + place, sums, mask=mask)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HAS_SLOTS:
        used = tl.load(count + _COUNT)
        product = outlier_tile(
            product, outliers, outlier_weight, row, feature, rows, features, slots, used, BLOCK_O
        )
    tl.store(outlier_product + place, product, mask=mask)


@triton.jit
def _join(
    accumulator,  # [M, N] int32
    outlier_product,  # [M, N] fp32
    scale,  # [M] fp32
    weight_scale,  # [N] fp32
    bias,  # [N]
    out,  # [M, N]
    features,
    HAS_BIAS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = feature < features
    place = row * features + feature
    sums = tl.load(accumulator + place, mask=mask, other=0).to(tl.float32)
    result = sums * tl.load(scale + row) * tl.load(weight_scale + feature, mask=mask, other=0.0)
    result += tl.load(outlier_product + place, mask=mask, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


@provider("mixed_gemm", name="tl", priority=PRIORITY, supports=supports)
def mixed_gemm(
    codes: Tensor, outliers: Tensor, count: Tensor, weight_codes: Tensor, outlier_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Both products by one kernel of small tiles."""
    code_rows = row_matrix(codes)
    (rows, columns), (features, slots) = code_rows.shape, outlier_weight.shape
    shape = (*codes.shape[:-1], features)
    accumulator = torch.empty(shape, dtype=torch.int32, device=codes.device)
    outlier_product = torch.empty(shape, dtype=torch.float32, device=codes.device)
    if accumulator.numel():
        with on_device(codes):
            weight = eight_bit_codes(row_matrix(weight_codes), columns)
            enqueue(
                _both_products, (ceil_div(rows, BLOCK_M) * ceil_div(features, BLOCK_N),),
                code_rows, outliers.reshape(rows, slots), count, weight, outlier_weight, accumulator,
                outlier_product, rows, features, columns, slots, code_rows.stride(0), weight.stride(0),
                HAS_SLOTS=slots > 0, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K, BLOCK_O=BLOCK_O,
            )  # fmt: skip
    return accumulator, outlier_product


@provider("dequantize", name="tl", priority=PRIORITY, supports=supports)
def dequantize(
    x: Tensor,
    accumulator: Tensor,
    outlier_product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """One program for each part of a row."""
    features = accumulator.shape[-1]
    out = torch.empty(accumulator.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with on_device(x):
            enqueue(
                _join, (scale.numel(), ceil_div(features, ELEMENTS)),
                accumulator.contiguous(), outlier_product.contiguous(), scale.contiguous(), weight_scale,
                bias, out, features, HAS_BIAS=bias is not None, ELEMENTS=ELEMENTS,
            )  # fmt: skip
    return out
