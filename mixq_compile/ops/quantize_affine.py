"""`mixq::quantize_affine`: rows to integer codes with zero points, with outlier columns that are fixed."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.errors import OptionError
from mixq_compile.formats import TensorFormat
from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import KernelQuery, supporting
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, quantized_like, results_of
from mixq_compile.ops.traits import declare

FORMATS = (TensorFormat(8, signed=False), TensorFormat(4, signed=False))


def affine_format(text: str) -> TensorFormat:
    """The format of a text that the operator takes. Raises OptionError for any other."""
    found = TensorFormat.parse(text)
    if found not in FORMATS:
        raise OptionError(
            f"mixq::quantize_affine writes {' or '.join(map(str, FORMATS))}, codes with one scale and one "
            f"zero point a row, not {text}: mixq::quantize writes those without zero points."
        )
    return found


@operator("mixq::quantize_affine", mutates_args=(), tags=LAYOUT)
def quantize_affine(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    count: Tensor,
    format: str,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes rows between their smallest and largest value, with fixed outlier columns.

    x `[..., K]`; index `[C]`, column_slot `[K]`, count int32 (C = 0: no outliers); format of the codes:
    `uint8` or `uint4`. Returns codes int8 `[..., K]`, which are the format's less `2^(bits-1)` so that they
    fit; scale fp32 `[...]`; zero int32 `[...]`, of those shifted codes: `x ≈ scale * (codes - zero)`;
    outliers `[..., C]` in x's dtype. Outlier columns have the code `zero`, so that a product is corrected by
    sums over all columns. Raises OptionError for another format.
    """
    fmt = affine_format(format)
    operand_checks.QUANTIZE_AFFINE.check(x, index, column_slot, count)
    query = KernelQuery("quantize_affine", x.device, x.dtype, activation=fmt)
    return supporting(query, kernel).function(  # type: ignore[no-any-return]
        x, index, column_slot, count, format
    )


@results_of(quantize_affine)
def _(given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    affine_format(given.format)
    operand_checks.QUANTIZE_AFFINE.examine_named(given)
    codes, scale, outliers = quantized_like(given.x, given.index.shape[0])
    return codes, scale, given.x.new_empty(given.x.shape[:-1], dtype=torch.int32), outliers


declare(
    quantize_affine,
    quantizes="x",
    results=("codes", "scale", "zero", "outliers"),
    state={"index": "index", "column_slot": "column_slot", "count": "counters"},
)
