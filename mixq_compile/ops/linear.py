"""`mixq::linear`: the whole quantized linear as one operator, what `MixqLinear` calls.

Its schema is serialised with quantized models; the `swapped` pipeline expands it. What its lists hold is
said by the recipe (`ops/linear_recipe.py`), so that it stays the same for schemes whose weights have more
parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mixq_compile.errors import OperandError
from mixq_compile.ops import operand_checks
from mixq_compile.ops.activation_codes import code_bits
from mixq_compile.ops.composition import (
    STATIC,
    multiplied,
    quantized,
    refreshed,
    run_kernel,
    weight_only,
)
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.providers import AUTO, linear_query, small_batch_limit
from mixq_compile.ops.quantize_affine import affine_format
from mixq_compile.ops.registration import operator
from mixq_compile.ops.shared_declarations import LAYOUT, Given, results_of
from mixq_compile.ops.state_access import LEARNING, STATES, state_access
from mixq_compile.ops.traits import declare
from mixq_compile.ops.weight_codes import format_operand, told_by_codes
from mixq_compile.weights.recipe import keeps_columns


def small_batch_limit_of(x: Tensor, out_features: int, in_features: int, recipe: LinearRecipe) -> int:
    """The largest M that takes the weight-only path; 0 where one kernel serves all M.

    The features are given apart, because those of tensors may be symbolic.
    """
    if recipe.batch_invariant or recipe.activation is None or recipe.weight.sums:
        return 0
    if keeps_columns(recipe.weight, recipe.miss):
        return 0
    fmt = recipe.weight.format
    return small_batch_limit(linear_query(x, out_features, in_features, fmt, recipe.activation))


def _operands(recipe: LinearRecipe) -> operand_checks.Operands:
    plain = told_by_codes(recipe.weight.format) and recipe.weight.low_rank is None
    return operand_checks.LINEAR if plain else operand_checks.FORMATTED_LINEAR


def _examine_parts(recipe: LinearRecipe, given: Mapping[str, Any]) -> None:
    """Raises OperandError where the weight is not as its format says.

    Raises OptionError for an activation that no quantization writes, before anything is learned.
    """
    if recipe.activation is not None:
        (affine_format if recipe.weight.sums else code_bits)(str(recipe.activation))
    if not told_by_codes(recipe.weight.format):
        operand_checks.examine_weight(
            "linear", recipe.weight.format, given["x"], given["weight_codes"], given["weight_scale"],
            given.get("weight_zero"),
        )  # fmt: skip


@operator("mixq::linear", mutates_args=("state", "cache"), tags=LAYOUT)
def linear(
    x: Tensor,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    state: Sequence[Tensor],
    cache: Sequence[Tensor],
    row_mask: Tensor | None,
    recipe: str,
) -> Tensor:
    """The quantized linear `[..., K] -> [..., N]`: the composition of the other operators.

    weight, state and cache hold what the recipe, a text of `LinearRecipe`, says; state and cache are written.
    Without an activation format it is weight-only. C = 0 slots or the policy `static` never learn columns.
    row_mask, bool `[...]`, names the rows that may teach columns; None: all.
    """
    parsed = LinearRecipe.parse(recipe)
    given = parsed.named(weight, state, cache)
    given |= {"x": x, "bias": bias, "row_mask": row_mask, "kernel": AUTO}
    given |= format_operand(parsed.weight.format)
    _operands(parsed).check(*_operands(parsed).select(given))
    _examine_parts(parsed, given)
    # Not through the operators: each would cost a dispatch and check again what fits already.
    if parsed.activation is None:
        return weight_only(given, run_kernel)  # type: ignore[no-any-return]
    slots = given["index"].shape[0]
    given["format"] = str(parsed.activation)
    given["miss"] = miss = parsed.miss if slots else STATIC
    with state_access(x.device, miss in LEARNING):
        given["small_m"] = small_batch_limit_of(
            x, given["weight_codes"].shape[0], given["column_slot"].shape[0], parsed
        )
        quantized(given, run_kernel)
        if slots:
            with STATES.fetching:
                own = STATES.own_caches(given["index"], [given["cached_index"]], [given["outlier_weight"]])
                given["index"], (given["cached_index"],), (given["outlier_weight"],) = own
                refreshed(given, run_kernel)
        return multiplied(given, run_kernel)  # type: ignore[no-any-return]


@results_of(linear)
def _(given: Given) -> Tensor:
    parsed = LinearRecipe.parse(given.recipe)
    named = {**given, **parsed.named(given.weight, given.state, given.cache)}
    _operands(parsed).examine_named(named)
    _examine_parts(parsed, named)
    return given.x.new_empty((*given.x.shape[:-1], named["weight_codes"].shape[0]))  # type: ignore[no-any-return]


@linear.register_vmap
def _(info: Any, in_dims: Sequence[Any], x: Tensor, *others: Any) -> tuple[Tensor, int]:
    """The rows of all elements at once: a linear treats each row by itself."""
    x_dim, *other_dims = in_dims
    *operands, row_mask, recipe = others
    *operand_dims, mask_dim, _ = other_dims
    bias_dim, *list_dims = operand_dims
    if bias_dim is not None or any(dim is not None for dims in list_dims for dim in dims or ()):
        raise OperandError(
            "mixq::linear was called inside torch.vmap over its weights or its outlier state: one quantized "
            "linear has one of each. Map over its inputs alone, or call the linears one by one."
        )
    rows = x.movedim(x_dim, 0) if x_dim is not None else x.expand(info.batch_size, *x.shape)
    if row_mask is not None:
        moved = row_mask.movedim(mask_dim, 0) if mask_dim is not None else row_mask
        row_mask = moved.expand(rows.shape[:-1])
    return linear(rows, *operands, row_mask, recipe), 0


declare(linear, composite=True)
