"""Reference of `grouped_linear`: exact integer sums, one for each scale of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.kernels.ref.quantization import PRIORITY
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import KernelQuery, provider
from mixq_compile.weights import packing, rounding


def supports(query: KernelQuery) -> bool | str:
    """The reference supports weights of every format, and activations with one scale a row."""
    activation = query.activation
    if activation is None:
        return "it multiplies integer codes of the activation, and this one stays in 16 bit"
    if activation.group is not None:
        return f"it multiplies activations with one scale a row, not {activation}"
    return True


@provider("grouped_linear", name="ref", priority=PRIORITY, supports=supports)
def grouped_linear(
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    outlier_weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    weight_format: str,
) -> Tensor:
    fmt, in_features = TensorFormat.parse(weight_format), codes.shape[-1]
    unpacked = packing.unpack(weight_codes, fmt, in_features)
    # float64 holds every integer sum exactly, and a row's result, once rounded, does not depend on others.
    weight = rounding.centred(unpacked, weight_zero, fmt).double()
    steps = rounding.steps(weight_scale, fmt, torch.float64)
    integers, size = codes.double(), fmt.group or in_features
    total = integers.new_zeros((*codes.shape[:-1], weight.shape[0]))
    for group in range(steps.shape[1]):
        columns = slice(group * size, (group + 1) * size)
        total += (integers[..., columns] @ weight[:, columns].T) * steps[:, group]
    used = int(count[COUNT]) if outliers.shape[-1] else 0
    result = scale.double()[..., None] * total
    result += outliers[..., :used].double() @ outlier_weight[:, :used].double().T
    for term in (bias, addend):
        if term is not None:
            result += term.double()
    return result.to(outliers.dtype)
