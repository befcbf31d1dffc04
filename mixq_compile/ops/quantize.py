"""`mixq::quantize`: rows to integer codes, with outlier columns that are fixed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, QUANTIZED, quantized_like
from mixq_compile.ops.traits import declare


@operator("mixq::quantize", mutates_args=(), tags=LAYOUT)
def quantize(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    count: Tensor,
    bits: int,
    small_m: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows with fixed outlier columns.

    x `[..., K]`; index `[C]`, column_slot `[K]`, count int32 (C = 0: no outliers).
    Returns codes int8 `[..., K]`, scale fp32 `[...]`, outliers `[..., C]` in x's dtype.
    """
    operand_checks.QUANTIZE.check(x, index, column_slot, count)
    return run("quantize", kernel, x, 8, x, index, column_slot, count, bits, small_m)  # type: ignore[no-any-return]


@quantize.register_fake
def _(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    operand_checks.QUANTIZE.examine(x, index, column_slot, count)
    return quantized_like(x, index.shape[0])


declare(
    quantize,
    quantizes="x",
    results=QUANTIZED,
    state={"index": "index", "column_slot": "column_slot", "count": "counters"},
)
