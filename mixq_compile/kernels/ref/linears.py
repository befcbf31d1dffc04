"""Reference of the products: `mixed_gemm`, `dequantize`, `mixed_linear`, `weight_only_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.kernels.ref.quantization import PRIORITY, supports
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import KernelQuery, provider
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.weight_codes import (
    dequantize_weight,
    integer_codes,
)
from mixq_compile.weights import packing, rounding


@provider("mixed_gemm", name="ref", priority=PRIORITY, supports=supports)
def mixed_gemm(
    codes: Tensor, outliers: Tensor, count: Tensor, weight_codes: Tensor, outlier_weight: Tensor
) -> tuple[Tensor, Tensor]:
    # float64 holds every integer sum exactly: K * 127 * 128 is far below 2**53.
    weight = integer_codes(weight_codes, codes.shape[-1]).double()
    accumulator = (codes.double() @ weight.T).to(torch.int32)
    used = int(count[COUNT]) if outliers.shape[-1] else 0
    # In float64 a row's sum, once rounded, does not depend on the rows beside it.
    columns = outliers[..., :used].double()
    return accumulator, (columns @ outlier_weight[:, :used].double().T).float()


def _rounded(result: Tensor, bias: Tensor | None, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    for added in (bias, addend):
        if added is not None:
            result = result + added.float()
    return result.to(dtype)


@provider("dequantize", name="ref", priority=PRIORITY, supports=supports)
def dequantize(
    x: Tensor,
    accumulator: Tensor,
    outlier_product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None = None,
) -> Tensor:
    result = accumulator.float() * scale[..., None] * weight_scale + outlier_product
    return _rounded(result, bias, addend, x.dtype)


@provider("mixed_linear", name="ref", priority=PRIORITY, supports=supports)
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
    addend: Tensor | None = None,
) -> Tensor:
    if is_small_batch(codes, small_m):
        return weight_only_linear(x, weight_codes, weight_scale, bias, addend)  # type: ignore[no-any-return]
    accumulator, product = mixed_gemm(codes, outliers, count, weight_codes, outlier_weight)
    return dequantize(  # type: ignore[no-any-return]
        x, accumulator, product, scale, weight_scale, bias, addend
    )


def _supports_weight_only(query: KernelQuery) -> bool | str:
    if "weight_format" in query.operands:
        return True
    return supports(query)


@provider("weight_only_linear", name="ref", priority=PRIORITY, supports=_supports_weight_only)
def weight_only_linear(
    x: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    addend: Tensor | None = None,
    weight_zero: Tensor | None = None,
    weight_format: str = "",
) -> Tensor:
    if weight_format:
        fmt = TensorFormat.parse(weight_format)
        codes = packing.unpack(weight_codes, fmt, x.shape[-1])
        weight = rounding.values(codes, weight_scale, weight_zero, fmt)
    else:
        weight = dequantize_weight(weight_codes, weight_scale, x.shape[-1])
    result = (x.double() @ weight.double().T).float()
    return _rounded(result, bias, addend, x.dtype)
