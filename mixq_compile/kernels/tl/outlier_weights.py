# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""`refresh_outlier_weights`: one launch for all linears that read one activation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    await_previous_launch,
    on_device,
    overlap,
    supports,
    tl,
    triton,
)
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.weight_codes import weight_bits

ZEROED_BLOCK = 64
"""`mixed_linear` reads outlier columns in blocks of this many: the rest of the last one must be zero."""
ROWS_PER_STEP = 4096

_COUNT, _ZEROED_BLOCK = tl.constexpr(COUNT), tl.constexpr(ZEROED_BLOCK)


@triton.jit
def _weight_column(weight, scale, row, column, mask, row_stride, SOURCE: tl.constexpr):
    """One column of a linear's weight: from the original, or its 8 or 4-bit codes times the scales."""
    base = weight + row.to(tl.int64) * row_stride
    if SOURCE == 16:
        return tl.load(base + column, mask=mask, other=0.0).to(tl.float32)
    if SOURCE == 8:
        code = tl.load(base + column, mask=mask, other=0).to(tl.int32)
    else:
        packed = tl.load(base + column // 2, mask=mask, other=0).to(tl.int32)
        nibble = (packed >> (4 * (column % 2))) & 0xF
        code = (nibble ^ 8) - 8
    return code.to(tl.float32) * tl.load(scale + row, mask=mask, other=0.0)


@triton.jit
def _refresh(
    index,  # [C] int32
    count,  # [1] int32
    cached_index,  # for each linear [C] int32
    outlier_weight,  # for each linear [N, C]
    weight,  # for each linear [N, K]: the original, or codes
    weight_scale,  # for each linear [N]
    out_features,
    row_strides,
    slots,
    SOURCES: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    # A program owns one slot of one linear, so that none waits for another before `cached_index`
    # changes.
    slot = tl.program_id(0)
    used = tl.load(count + _COUNT)
    for reader in tl.static_range(len(SOURCES)):
        if tl.program_id(1) == reader:
            cached = tl.load(cached_index[reader] + slot)
            wanted = tl.where(slot < used, tl.load(index + slot), -1)
            end = tl.cdiv(used, _ZEROED_BLOCK) * _ZEROED_BLOCK
            if (cached != wanted) & (slot < end):
                target = outlier_weight[reader]
                for start in range(0, out_features[reader], STEP):
                    row = start + tl.arange(0, STEP)
                    inside = row < out_features[reader]
                    value = _weight_column(
                        weight[reader], weight_scale[reader], row, tl.maximum(wanted, 0),
                        inside & (wanted >= 0), row_strides[reader], SOURCES[reader],
                    )  # fmt: skip
                    place = target + row.to(tl.int64) * slots + slot
                    tl.store(place, value.to(target.dtype.element_ty), mask=inside)
                tl.store(cached_index[reader] + slot, wanted)


@provider("refresh_outlier_weights", name="tl", priority=PRIORITY, supports=supports)
def refresh_outlier_weights(
    codes: Tensor,
    index: Tensor,
    count: Tensor,
    cached_index: Sequence[Tensor],
    outlier_weight: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    original: Sequence[Tensor],
    small_m: int,
) -> None:
    """A program a slot and linear, which returns at once where the slot holds its column already."""
    if is_small_batch(codes, small_m) or not codes.numel() or not index.shape[0]:
        return
    pairs = list(zip(original, weight_codes, strict=True))
    held = [kept if kept.numel() else packed for kept, packed in pairs]
    sources = [16 if kept.numel() else weight_bits(packed) for kept, packed in pairs]
    with on_device(codes):
        enqueue(
            _refresh, (index.shape[0], len(held)),
            index, count, tuple(cached_index), tuple(outlier_weight), tuple(held), tuple(weight_scale),
            tuple(cache.shape[0] for cache in outlier_weight), tuple(weight.stride(0) for weight in held),
            index.shape[0], SOURCES=tuple(sources), STEP=ROWS_PER_STEP, num_warps=8,
            **overlap(codes),
        )  # fmt: skip
