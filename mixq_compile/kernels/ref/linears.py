"""Reference of the products: `mixed_gemm`, `dequantize`, `mixed_linear`, `weight_only_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.ref.quantization import PRIORITY, supports
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.weight_codes import dequantize_weight, integer_codes


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


@provider("dequantize", name="ref", priority=PRIORITY, supports=supports)
def dequantize(
    x: Tensor,
    accumulator: Tensor,
    outlier_product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    result = accumulator.float() * scale[..., None] * weight_scale + outlier_product
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


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
) -> Tensor:
    if is_small_batch(codes, small_m):
        return weight_only_linear(x, weight_codes, weight_scale, bias)  # type: ignore[no-any-return]
    accumulator, product = mixed_gemm(codes, outliers, count, weight_codes, outlier_weight)
    return dequantize(x, accumulator, product, scale, weight_scale, bias)  # type: ignore[no-any-return]


@provider("weight_only_linear", name="ref", priority=PRIORITY, supports=supports)
def weight_only_linear(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    weight = dequantize_weight(weight_codes, weight_scale, x.shape[-1])
    result = (x.double() @ weight.double().T).float()
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)
