"""Reference of `quantize_affine`: the arithmetic of `quantize`, with a zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.kernels.ref.quantization import PRIORITY, extract, finite_rows, rows_of, shaped
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import KernelQuery, provider
from mixq_compile.ops.quantize_affine import FORMATS
from mixq_compile.ops.weight_codes import EPSILON


def supports(query: KernelQuery) -> bool | str:
    """The reference supports every call in the formats of the operator."""
    written = " and ".join(map(str, FORMATS))
    return query.activation in FORMATS or f"it writes {written}, not {query.activation}"


def _codes_scale_and_zero(
    values: Tensor, column_slot: Tensor, fmt: TensorFormat
) -> tuple[Tensor, Tensor, Tensor]:
    finite = finite_rows(values)
    # Zero lies in every range, so that outlier columns and padding are exactly the zero point.
    inner = values.masked_fill(column_slot >= 0, 0.0).masked_fill(~finite[:, None], 0.0)
    low, high = inner.amin(dim=1).clamp_max_(0), inner.amax(dim=1).clamp_min_(0)
    span = high - low
    steps = torch.full_like(span, fmt.largest_code)
    scale = span.clamp_min(EPSILON) / steps
    inverse = torch.where(span < EPSILON, 0.0, steps / span)
    zero = torch.round(-low * inverse).clamp_(0, fmt.largest_code)
    codes = torch.round(inner * inverse[:, None]) + zero[:, None]
    shift = 1 << (fmt.bits - 1)
    codes = codes.clamp_(0, fmt.largest_code) - shift
    # A range beyond fp32 has no scale.
    hopeless = ~(finite & torch.isfinite(span))
    return codes.to(torch.int8), scale.masked_fill(hopeless, torch.nan), (zero - shift).to(torch.int32)


@provider("quantize_affine", name="ref", priority=PRIORITY, supports=supports)
def quantize_affine(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, format: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix = x.reshape(rows_of(x), x.shape[-1])
    codes, scale, zero = _codes_scale_and_zero(matrix.float(), column_slot, TensorFormat.parse(format))
    outliers = extract(matrix, index, int(count[COUNT]) if index.shape[0] else 0)
    codes, scale, outliers = shaped(x, codes, scale, outliers)
    return codes, scale, zero.reshape(x.shape[:-1]), outliers
