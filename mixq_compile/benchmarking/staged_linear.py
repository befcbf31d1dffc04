"""The same mixed linear in the stages of its history: from separate kernels to fused ones.

Every stage computes the same: outlier columns in 16 bit, the rest in integers. The early stages are
ordinary torch operators, the integer product is the library's in all but the last. Every slot must be
in use: the library multiplies all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile import ops
from mixq_compile.benchmarking.packed_linear import ACTIVATION, PackedLinear
from mixq_compile.ops.outlier_state import COUNT, FLAG
from mixq_compile.ops.weight_codes import EPSILON
from mixq_compile.thresholds import state_number

_LARGEST_CODE = ACTIVATION.largest_code


def detect_first(linear: PackedLinear, x: Tensor) -> Tensor:
    """Looks for the outlier columns of this call, waits for the device to say which, then quantizes."""
    above = x.abs().amax(dim=0) > state_number(linear.state.threshold)
    columns = above.nonzero().flatten()  # the host waits here: it must know how many
    codes, scale = _row_codes(x.index_fill(1, columns, 0.0))
    product = x[:, columns] @ linear.weight[:, columns].t()
    return _joined(x, _integer_product(codes, linear.codes), product, scale, linear)


def quantize_ahead(linear: PackedLinear, x: Tensor) -> Tensor:
    """Quantizes with the columns known so far and checks afterwards, each step a kernel of its own."""
    slots = linear.state.index.long()
    used = torch.arange(len(slots), dtype=torch.int32, device=x.device) < linear.state.counters[COUNT]
    outliers = x[:, slots] * used
    inner = torch.where(linear.state.column_slot < 0, x, 0.0)
    codes, scale = _row_codes(inner)
    exceeds = (scale * _LARGEST_CODE > linear.state.effective_threshold).any()
    linear.state.counters[FLAG] = exceeds  # what a later step would look at; nothing exceeds here
    product = outliers @ linear.outlier_weight.t()
    return _joined(x, _integer_product(codes, linear.codes), product, scale, linear)


def fused_quantization(linear: PackedLinear, x: Tensor) -> Tensor:
    """One operator quantizes, extracts and checks; products and dequantization stay apart."""
    quantized = linear.quantize_online(x)
    linear.refresh(quantized)
    codes, scale, outliers, _ = quantized
    product = outliers @ linear.outlier_weight.t()
    return _joined(x, _integer_product(codes, linear.codes), product, scale, linear)


def fused(linear: PackedLinear, x: Tensor) -> Tensor:
    """The product, its scales and the outlier product in one kernel: the operator as it is."""
    return linear.whole(x)


STAGES = {
    "detect first, host waits": detect_first,
    "quantize ahead of detection": quantize_ahead,
    "fused quantization": fused_quantization,
    "fused dequantization": fused,
}
WAITING = ("detect first, host waits",)
"""Stages that no CUDA graph can hold."""


def _row_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[M, K]` and scales fp32 `[M]`, by one torch operator after the other."""
    values = x.float()
    scale = values.abs().amax(dim=1).clamp_min(EPSILON) / _LARGEST_CODE
    return torch.round(values / scale[:, None]).to(torch.int8), scale


def _integer_product(codes: Tensor, weight_codes: Tensor) -> Tensor:
    return torch._int_mm(codes, weight_codes.t())


def _joined(x: Tensor, sums: Tensor, product: Tensor, scale: Tensor, linear: PackedLinear) -> Tensor:
    return ops.dequantize(  # type: ignore[no-any-return]
        x, sums, product.float(), scale, linear.scale, None, linear.kernel
    )
