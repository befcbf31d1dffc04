"""`mixq::quantize`: rows to integer codes, with outlier columns that are fixed."""

from __future__ import annotations

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.activation_codes import code_bits
from mixq_compile.ops.providers import ANY_WEIGHT, run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, QUANTIZED, Given, quantized_like, results_of
from mixq_compile.ops.traits import declare


@operator("mixq::quantize", mutates_args=(), tags=LAYOUT)
def quantize(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    count: Tensor,
    format: str,
    small_m: int,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows with fixed outlier columns.

    x `[..., K]`; index `[C]`, column_slot `[K]`, count int32 (C = 0: no outliers); format of the codes:
    int8 or int4. Returns codes int8 `[..., K]`, scale fp32 `[...]`, outliers `[..., C]` in x's dtype.
    Raises OptionError for another format.
    """
    operand_checks.QUANTIZE.check(x, index, column_slot, count)
    return run(  # type: ignore[no-any-return]
        "quantize", kernel, x, ANY_WEIGHT, format,
        x, index, column_slot, count, format, small_m,
    )  # fmt: skip


@results_of(quantize)
def _(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    code_bits(given.format)
    operand_checks.QUANTIZE.examine_named(given)
    return quantized_like(given.x, given.index.shape[0])


declare(
    quantize,
    quantizes="x",
    results=QUANTIZED,
    state={"index": "index", "column_slot": "column_slot", "count": "counters"},
)
