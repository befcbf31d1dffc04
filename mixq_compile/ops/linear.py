"""`mixq::linear`: the whole quantized linear as one operator, what `MixqLinear` calls.

Its schema is serialised with quantized models; the `swapped` pipeline expands it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mixq_compile.ops import operand_checks
from mixq_compile.ops.composition import STATIC, multiplied, quantized, refreshed, run_kernel, weight_only
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.ops.providers import AUTO, linear_query, small_batch_limit
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, STATE, WEIGHT
from mixq_compile.ops.state_access import LEARNING, STATES, state_access
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import format_of
from mixq_compile.scheme import OutlierPolicy


def policy_text(policy: OutlierPolicy | None) -> str:
    """Miss policy and configured threshold in one text, such as `exact 6.0`.

    A text, because Dynamo makes a graph input of a float where shapes are dynamic. Passes compare the
    threshold; the one in force is in the state.
    """
    return f"{policy.miss} {policy.threshold!r}" if policy else "static inf"


def parse_policy(text: str) -> tuple[str, float]:
    """Miss policy and threshold that `policy_text` wrote."""
    miss, _, threshold = text.partition(" ")
    return miss, float(threshold)


def small_batch_limit_of(x: Tensor, weight_codes: Tensor, in_features: int, batch_invariant: bool) -> int:
    """The largest M that takes the weight-only path for this weight; 0 where one kernel serves all M.

    `in_features` is given apart, because x's own may be symbolic.
    """
    if batch_invariant:
        return 0
    return small_batch_limit(linear_query(x, weight_codes.shape[0], in_features, format_of(weight_codes)))


@operator("mixq::linear", mutates_args=(*STATE_FIELDS, "cached_index", "outlier_weight"), tags=LAYOUT)
def linear(
    x: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    cached_index: Tensor,
    outlier_weight: Tensor,
    original: Tensor,
    activation_bits: int,
    batch_invariant: bool,
    policy: str,
) -> Tensor:
    """The quantized linear `[..., K] -> [..., N]`: the composition of the other operators.

    activation_bits 16 is weight-only; C = 0 slots or the policy `static` never learn columns.
    original is the 16-bit weight or an empty tensor. policy is what `policy_text` writes.
    """
    operand_checks.LINEAR.check(
        x, weight_codes, weight_scale, bias, index, column_slot, column_max, counters, effective_threshold,
        cached_index, outlier_weight, original,
    )  # fmt: skip
    given = {
        "x": x,
        "weight_codes": weight_codes,
        "weight_scale": weight_scale,
        "bias": bias,
        "index": index,
        "column_slot": column_slot,
        "column_max": column_max,
        "counters": counters,
        "effective_threshold": effective_threshold,
        "cached_index": cached_index,
        "outlier_weight": outlier_weight,
        "original": original,
        "bits": activation_bits,
        "kernel": AUTO,
    }
    # Not through the operators: each would cost a dispatch and check again what fits already.
    if activation_bits == 16:
        return weight_only(given, run_kernel)  # type: ignore[no-any-return]
    slots = index.shape[0]
    given["miss"] = miss = parse_policy(policy)[0] if slots else STATIC
    with state_access(x.device, miss in LEARNING):
        given["small_m"] = small_batch_limit_of(x, weight_codes, column_slot.shape[0], batch_invariant)
        quantized(given, run_kernel)
        if slots:
            with STATES.fetching:
                own = STATES.own_caches(index, [cached_index], [outlier_weight])
                given["index"], (given["cached_index"],), (given["outlier_weight"],) = own
                refreshed(given, run_kernel)
        return multiplied(given, run_kernel)  # type: ignore[no-any-return]


@linear.register_fake
def _(x: Tensor, weight_codes: Tensor, *others: Any) -> Tensor:
    operand_checks.LINEAR.examine(x, weight_codes, *others[:10])
    return x.new_empty((*x.shape[:-1], weight_codes.shape[0]))


declare(linear, composite=True, rows=WEIGHT, state=STATE)
