"""Reference of `quantize` and `quantize_online`: the specification, in plain torch on any device.

It may read the device from the host, which the other providers never do.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mixq_compile.ops.activation_codes import largest_code
from mixq_compile.ops.outlier_state import (
    COUNT,
    FLAG,
    FROZEN,
    LARGEST_RELATIVE,
    OVERFLOW,
    RELATIVE_BITS,
    SMALLEST_RELATIVE,
    TEACHING_LIMIT,
)
from mixq_compile.ops.providers import KernelQuery, provider, refused_format
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.state_access import STATES, State
from mixq_compile.ops.weight_codes import EPSILON, aligned_empty

PRIORITY = 0


def supports(query: KernelQuery) -> bool | str:
    """The reference supports every call in the formats of the operators."""
    return refused_format(query) or True


def finite_rows(values: Tensor) -> Tensor:
    return torch.isfinite(values).all(dim=1)


def _row_maximum(values: Tensor, column_slot: Tensor, rows: Tensor) -> Tensor:
    """Largest magnitude of each row outside the outlier columns, 0 in rows that are not among `rows`."""
    inner = values.masked_fill(column_slot >= 0, 0.0).masked_fill(~rows[:, None], 0.0)
    return inner.abs().amax(dim=1) if values.shape[1] else values.new_zeros(values.shape[0])


def _codes_and_scale(values: Tensor, column_slot: Tensor, largest_code: int) -> tuple[Tensor, Tensor]:
    finite = finite_rows(values)
    row_maximum = _row_maximum(values, column_slot, finite)
    # With a number in place of a tensor torch would round twice, multiplying by a reciprocal: `number /
    # tensor` everywhere, `tensor / number` on GPUs.
    largest_codes = torch.full_like(row_maximum, largest_code)
    scale = row_maximum.clamp_min(EPSILON) / largest_codes
    inverse = largest_codes / row_maximum
    inverse = torch.where(row_maximum < EPSILON, 0.0, inverse)
    inner = values.masked_fill(column_slot >= 0, 0.0).masked_fill(~finite[:, None], 0.0)
    codes = torch.round(inner * inverse[:, None]).clamp_(-largest_code, largest_code)
    return codes.to(torch.int8), scale.masked_fill(~finite, torch.nan)


def teaching(scale: Tensor) -> Tensor:
    """Which rows of these scales `[M]` columns are learned from: bool `[M]`."""
    return scale < TEACHING_LIMIT


def extract(x: Tensor, index: Tensor, count: int) -> Tensor:
    """The outlier columns of x, by slot; zero in the slots from `count` on."""
    outliers = x.new_zeros(x.shape[0], index.shape[0])
    outliers[:, :count] = x[:, index[:count].long()]
    return outliers


def shaped(x: Tensor, codes: Tensor, scale: Tensor, outliers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leading = tuple(x.shape[:-1])
    aligned = aligned_empty(leading, x.shape[-1], torch.int8, x.device)
    aligned.copy_(codes.reshape(x.shape))
    return aligned, scale.reshape(leading), outliers.reshape(*leading, outliers.shape[-1])


def rows_of(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


@provider("quantize", name="ref", priority=PRIORITY, supports=supports)
def quantize(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, format: str, small_m: int
) -> tuple[Tensor, Tensor, Tensor]:
    matrix = x.reshape(rows_of(x), x.shape[-1])
    codes, scale = _codes_and_scale(matrix.float(), column_slot, largest_code(format))
    outliers = extract(matrix, index, int(count[COUNT]) if index.shape[0] else 0)
    return shaped(x, codes, scale, outliers)


def _largest(pool: list[tuple[float, int]], room: int) -> list[tuple[float, int]]:
    """The `room` entries of largest maximum; of equal ones those of the lowest column."""
    return sorted(pool, key=lambda entry: (-entry[0], entry[1]))[:room]


def is_relative(effective_threshold: Tensor) -> bool:
    """Whether a threshold is a multiple of a row's mean magnitude; waits for the device."""
    return bool(effective_threshold < 0)


def row_factors(values: Tensor, relative: bool) -> Tensor:
    """What magnitudes of each row of values `[M, K]` are multiplied by to compare them, fp32 `[M]`.

    1 for magnitudes as they are, else the inverse of the row's mean magnitude over all columns, known
    ones too; 0 in rows that have none. Exact up to one rounding and independent of order: magnitudes count
    as whole units of a power of two, of which the row's largest has between 2^13 and 2^14.
    """
    rows, columns = values.shape
    if not relative:
        return values.new_ones(rows)
    magnitudes = values.abs()
    largest = magnitudes.amax(dim=1) if columns else values.new_zeros(rows)
    usable = (largest >= SMALLEST_RELATIVE) & (largest < LARGEST_RELATIVE)
    exponent = largest.masked_fill(~usable, 1.0).view(torch.int32) >> 23
    per_unit = ((254 + RELATIVE_BITS - exponent) << 23).view(torch.float32)
    units = (magnitudes.masked_fill(~usable[:, None], 1.0) * per_unit[:, None]).to(torch.int32)
    totals = units.sum(dim=1).float()
    factors = torch.full_like(totals, columns) / totals * per_unit
    return torch.where(usable, factors, 0.0)


def column_maxima(values: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    """The largest magnitude of each column of values `[M, K]` over these rows, bool `[M]`: `[K]`.

    `factors` `[M]` are those of the rows, see `row_factors`.
    """
    compared = values.abs() * factors[:, None]
    return compared.masked_fill(~rows[:, None], 0.0).amax(dim=0)


def grow(
    maxima: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    may_evict: bool,
) -> None:
    """Adds the columns whose maximum, in `maxima` `[K]`, is above the effective threshold to the state.

    Where that is negative, it and the maxima are multiples of rows' means.

    New columns take free slots in ascending order. Where they do not all fit, the C columns of
    largest running maximum stay (without `may_evict`, known columns stay in any case), the others
    are counted as overflow, and the effective threshold rises to the largest maximum left out.
    """
    capacity = index.shape[0]
    count = int(counters[COUNT])
    slots = index[:count].long()
    column_max[:count] = torch.maximum(column_max[:count], maxima[slots])
    above = (maxima > effective_threshold.abs()) & (column_slot < 0)
    found = [(float(maxima[column]), int(column)) for column in above.nonzero().flatten()]

    known = list(zip(column_max[:count].tolist(), slots.tolist(), strict=True))
    left_out: list[tuple[float, int]] = []
    if count + len(found) > capacity:
        kept = _largest(known + found, capacity) if may_evict else known + _largest(found, capacity - count)
        left_out = [entry for entry in known + found if entry not in kept]
        found = [entry for entry in found if entry in kept]
        counters[OVERFLOW] += len(left_out)
        limit = max(value for value, _ in left_out)
        if is_relative(effective_threshold):
            effective_threshold.clamp_(max=-limit)
        else:
            effective_threshold.clamp_(min=limit)
    dropped = {column for _, column in left_out}
    free = [slot for slot, (_, column) in enumerate(known) if column in dropped]
    free += range(count, capacity)
    for _, column in known:
        if column in dropped:
            column_slot[column] = -1
    for slot, (maximum, column) in zip(free, sorted(found, key=lambda entry: entry[1]), strict=False):
        index[slot] = column
        column_slot[column] = slot
        column_max[slot] = maximum
    counters[COUNT] = min(capacity, count - len([c for _, c in known if c in dropped]) + len(found))


def replace(
    maxima: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
) -> None:
    """Sets the state to the columns whose maximum in `maxima` `[K]` reaches the threshold (`per_call`)."""
    reached = (maxima >= effective_threshold.abs()).nonzero().flatten()
    found = [(float(maxima[column]), int(column)) for column in reached]
    kept = sorted(_largest(found, index.shape[0]), key=lambda entry: entry[1])
    counters[OVERFLOW] += len(found) - len(kept)
    column_slot.fill_(-1)
    for slot, (maximum, column) in enumerate(kept):
        index[slot] = column
        column_slot[column] = slot
        column_max[slot] = maximum
    counters[COUNT] = len(kept)


def among(teaches: Tensor | None, row_mask: Tensor | None, values: Tensor) -> Tensor | None:
    """Of the rows of values `[M, K]` that teach those which `row_mask` `[...]` lets teach: for `learn`."""
    if row_mask is None:
        return teaches
    return (finite_rows(values) if teaches is None else teaches) & row_mask.reshape(-1)


def learn(values: Tensor, teaches: Tensor | None, state: State, miss: str) -> State:
    """Changes a state by the columns of values `[M, K]` as the policy says; returns the one that now holds.

    Only the rows in `teaches`, bool `[M]`, count (see `teaching`); None: those that are finite.

    That is the state itself, or this call's copy of it where other threads read it. Under `lazy` what is
    learned holds for later calls only.
    """
    rows = finite_rows(values) if teaches is None else teaches
    maxima = column_maxima(values, rows, row_factors(values, is_relative(state[4])))
    if miss == "per_call":
        return STATES.learn(state, functools.partial(replace, maxima), remembered=False)
    if miss == "lazy":
        STATES.learn_later(state, functools.partial(grow, maxima, may_evict=False))
        return STATES.current(state)
    return STATES.learn(state, functools.partial(grow, maxima, may_evict=True))


@provider("quantize_online", name="ref", priority=PRIORITY, supports=supports)
def quantize_online(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    format: str,
    miss: str,
    small_m: int,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrix = x.reshape(rows_of(x), x.shape[-1])
    if is_small_batch(matrix, small_m) or not matrix.numel():
        codes, scale = _codes_and_scale(matrix.float(), column_slot, largest_code(format))
        return *shaped(x, codes, scale, extract(matrix, index, 0)), torch.zeros_like(counters[:1])
    values, largest = matrix.float(), largest_code(format)
    shared = (index, column_slot, column_max, counters, effective_threshold)
    state = STATES.current(shared)
    learns = miss != "static" and not int(counters[FROZEN])
    if learns and miss == "per_call":
        state = learn(values, among(None, row_mask, values), shared, miss)
    codes, scale = _codes_and_scale(values, state[1], largest)
    teaches = teaching(scale) if row_mask is None else teaching(scale) & row_mask.reshape(-1)
    compared = _row_maximum(values, state[1], teaches) * row_factors(values, is_relative(state[4]))
    exceeded = learns and miss != "per_call" and bool((compared > state[4].abs()).any())
    if exceeded and miss != "lazy":
        state = learn(values, teaches, shared, miss)
        codes, scale = _codes_and_scale(values, state[1], largest)
    index, _, _, counters, _ = state
    count = int(counters[COUNT])
    outliers = extract(matrix, index, count)
    if exceeded and miss == "lazy":
        learn(values, teaches, shared, miss)
    counters[FLAG] = 0
    used = torch.full_like(counters[:1], count)
    return *shaped(x, codes, scale, outliers), used
