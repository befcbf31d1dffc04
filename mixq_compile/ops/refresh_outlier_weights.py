"""`mixq::refresh_outlier_weights`: what caches of outlier columns hold follows what a state has learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mixq_compile.errors import OperandError
from mixq_compile.ops import operand_checks
from mixq_compile.ops.providers import ANY_ACTIVATION, ANY_WEIGHT, run
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, results_of
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.traits import declare


@operator("mixq::refresh_outlier_weights", mutates_args=("cached_index", "outlier_weight"), tags=LAYOUT)
def refresh_outlier_weights(
    codes: Tensor,
    index: Tensor,
    count: Tensor,
    cached_index: Sequence[Tensor],
    outlier_weight: Sequence[Tensor],
    weight_codes: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    original: Sequence[Tensor],
    small_m: int,
    kernel: str,
) -> None:
    """Fetches the columns of slots below `count` whose `cached_index` differs from `index`.

    For each linear that reads one quantization point: cached_index `[C]` int32 (-1 empty),
    outlier_weight `[N, C]`, weight_codes `[N, K]`, weight_scale `[N]`, and original: the 16-bit
    weight `[N, K]`, or an empty tensor where only the codes are at hand. Linears that follow each other
    may have one outlier_weight `[N_1 + N_2, C]`. Slots from `count` to the next multiple of 64 are zero.
    Does nothing where codes have at most `small_m` rows.
    """
    if weight_codes:
        with STATES.fetching:
            index, cached_index, outlier_weight = STATES.own_caches(index, cached_index, outlier_weight)
            lists = cached_index, outlier_weight, weight_codes, weight_scale, original
            held = check_linears(codes, index, count, *lists)
            run(
                "refresh_outlier_weights", kernel, outlier_weight[0], ANY_WEIGHT, ANY_ACTIVATION,
                codes, index, count, cached_index, held, weight_codes, weight_scale, original, small_m,
            )  # fmt: skip


def check_linears(
    codes: Tensor, index: Tensor, count: Tensor, cached_index: Sequence[Tensor],
    outlier_weight: Sequence[Tensor], weight_codes: Sequence[Tensor], *others: Sequence[Tensor],
) -> Sequence[Tensor]:  # fmt: skip
    """The outlier weight of each linear. Raises OperandError where their tensors do not fit each other."""
    held = _rows_of_each(outlier_weight, weight_codes)
    for each in _readers(cached_index, held, weight_codes, *others):
        operand_checks.REFRESH.check(codes, index, count, *each)
    return held


def _rows_of_each(outlier_weight: Sequence[Tensor], weight_codes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outlier weight `[N, C]` of each linear, where some hold the rows of several."""
    if len(outlier_weight) == len(weight_codes):
        return outlier_weight
    held_rows = sum(held.shape[0] for held in outlier_weight)
    wanted_rows = sum(codes.shape[0] for codes in weight_codes)
    if held_rows != wanted_rows:
        raise OperandError(
            f"mixq::refresh_outlier_weights: outlier_weight has {held_rows} rows in all, and weight_codes "
            f"{wanted_rows}: both must be alike."
        )
    rows = iter([codes.shape[0] for codes in weight_codes])
    parts = []
    for held in outlier_weight:
        start = 0
        while start < held.shape[0]:
            parts.append(held.narrow(0, start, next(rows)))
            start += parts[-1].shape[0]
    return parts


def _readers(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """cached_index, outlier weight, codes, scale and original of each linear."""
    lengths = [len(each) for each in lists]
    if len(set(lengths)) > 1:
        raise OperandError(
            "mixq::refresh_outlier_weights: cached_index, outlier_weight, weight_codes, weight_scale and "
            f"original describe {lengths} linears: they must be of the same ones."
        )
    return zip(*lists, strict=True)


@results_of(refresh_outlier_weights)
def check_readers(given: Given) -> None:
    """Raises OperandError where the linears' tensors do not fit each other; for operands without values."""
    held = _rows_of_each(given.outlier_weight, given.weight_codes)
    readers = given.cached_index, held, given.weight_codes, given.weight_scale, given.original
    for each in _readers(*readers):
        operand_checks.REFRESH.examine(given.codes, given.index, given.count, *each)


declare(
    refresh_outlier_weights,
    source="outlier_weight",
    state={"index": "index"},
    each=("cached_index", "outlier_weight", "weight_codes", "weight_scale", "original"),
)
