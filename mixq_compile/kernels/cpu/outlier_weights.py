"""`refresh_outlier_weights` on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref

from torch import Tensor

from mixq_compile.kernels.cpu.availability import PRIORITY, supports
from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import RefreshArguments, WeightCodes, row_matrix, type_number
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch


@provider("refresh_outlier_weights", name="cpu", priority=PRIORITY, supports=supports)
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
    """Fetches the columns that each linear's cache does not hold yet; only looks where there are none."""
    in_features = codes.shape[-1]
    if is_small_batch(codes, small_m) or not codes.numel():
        return
    for cached, cache, packed, scale, source in zip(
        cached_index, outlier_weight, weight_codes, weight_scale, original, strict=True
    ):
        packed = row_matrix(packed)
        address, strides = (source.data_ptr(), source.stride()) if source.numel() else (None, (0, 0))
        arguments = RefreshArguments(
            index.data_ptr(), count.data_ptr(), cached.data_ptr(), cache.data_ptr(),
            WeightCodes.of(packed, in_features), scale.data_ptr(), address,
            cache.shape[1], cache.stride(0), *strides, type_number(cache.dtype), type_number(source.dtype),
        )  # fmt: skip
        library().mixq_refresh(byref(arguments))
