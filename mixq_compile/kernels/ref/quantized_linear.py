"""Reference of `quantized_linear`: its three parts, one after the other."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.kernels.ref.linears import mixed_linear
from mixq_compile.kernels.ref.quantization import PRIORITY, quantize_online, supports
from mixq_compile.ops.activation_functions import FUNCTIONS
from mixq_compile.ops.providers import provider


@provider("quantized_linear", name="ref", priority=PRIORITY, supports=supports)
def quantized_linear(
    codes: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    function: str,
    format: str,
    miss: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The linear's operands, then the state of its value."""
    value = mixed_linear(
        outliers, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias, 0
    )
    state = (index, column_slot, column_max, counters, effective_threshold)
    return quantize_online(FUNCTIONS[function](value), *state, format, miss, 0)  # type: ignore[no-any-return]
