"""Reference of `refresh_outlier_weights`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixq_compile.kernels.ref.quantization import PRIORITY, supports
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.weight_codes import dequantize_weight

ZEROED_BLOCK = 64
"""The GEMM reads outlier columns in blocks of this many: the rest of the last block must be zero."""


@provider("refresh_outlier_weights", name="ref", priority=PRIORITY, supports=supports)
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
    in_features = codes.shape[-1]
    if is_small_batch(codes, small_m) or not codes.numel():
        return
    used = int(count[COUNT])
    for cached, cache, packed, scale, source in zip(
        cached_index, outlier_weight, weight_codes, weight_scale, original, strict=True
    ):
        stale = (cached[:used] != index[:used]).nonzero().flatten()
        if len(stale):
            columns = index[stale].long()
            weight = source if source.numel() else dequantize_weight(packed, scale, in_features)
            cache[:, stale] = weight[:, columns].to(cache.dtype)
            cached[stale] = index[stale]
        end = min(cache.shape[1], (used + ZEROED_BLOCK - 1) // ZEROED_BLOCK * ZEROED_BLOCK)
        if (cached[used:end] >= 0).any():
            cache[:, used:end] = 0
            cached[used:end] = -1
