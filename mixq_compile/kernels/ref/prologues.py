"""Reference of `norm_quantize` and `activation_quantize`: the value as models compute it, quantized."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixq_compile.kernels.ref.quantization import PRIORITY, quantize_online, supports
from mixq_compile.ops.providers import provider

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, norm: str) -> Tensor:
    """The norm of rows `[..., K]`, in x's dtype."""
    if norm == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return weight * values.to(x.dtype)


def activated(x: Tensor, factor: Tensor | None, function: str) -> Tensor:
    """The function of x, times the factor."""
    result = FUNCTIONS[function](x)
    return result if factor is None else result * factor


@provider("norm_quantize", name="ref", priority=PRIORITY, supports=supports)
def norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    epsilon: float,
    norm: str,
    bits: int,
    miss: str,
    small_m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The norm, then its quantization."""
    value = normalized(x, weight, bias, epsilon, norm)
    state = (index, column_slot, column_max, counters, effective_threshold)
    return value, *quantize_online(value, *state, bits, miss, small_m)


@provider("activation_quantize", name="ref", priority=PRIORITY, supports=supports)
def activation_quantize(
    x: Tensor,
    factor: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    function: str,
    bits: int,
    miss: str,
    small_m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The function and the product, then their quantization."""
    value = activated(x, factor, function)
    state = (index, column_slot, column_max, counters, effective_threshold)
    return value, *quantize_online(value, *state, bits, miss, small_m)
