"""Reference of `activated_linear`: the product and the function of it, in fp32."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.kernels.ref.linears import dequantize, mixed_gemm, weight_only_linear
from mixq_compile.kernels.ref.quantization import PRIORITY, supports
from mixq_compile.ops.activation_functions import FUNCTIONS
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch


def activated(product: Tensor, function: str, gated: bool) -> Tensor:
    """The function of a product, or of its first half times the second."""
    if not gated:
        return FUNCTIONS[function](product)
    gates, values = product.chunk(2, dim=-1)
    return FUNCTIONS[function](gates) * values


@provider("activated_linear", name="ref", priority=PRIORITY, supports=supports)
def activated_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    function: str,
    gated: bool,
    small_m: int,
) -> Tensor:
    if is_small_batch(codes, small_m):
        product = weight_only_linear(x, weight_codes, weight_scale, bias).float()
    else:
        accumulator, outlier_product = mixed_gemm(codes, outliers, count, weight_codes, outlier_weight)
        product = dequantize(outlier_product, accumulator, outlier_product, scale, weight_scale, bias)
    return activated(product, function, gated).to(x.dtype)
