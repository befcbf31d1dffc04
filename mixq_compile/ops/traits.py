"""What passes, reports and views may know of an operator beside its schema: stated where it is defined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixq_compile.errors import PipelineError
from mixq_compile.ops import providers

_TRAITS: dict[Any, Traits] = {}
"""By overload, and by the overload's text, which is how a snapshot names it."""


@dataclass(frozen=True)
class Traits:
    """What is known of one operator; operands and results are named, never counted."""

    name: str
    """Without its namespace: `mixed_linear`."""
    composite: bool = False
    """Made of other operators: passes expand it, and no provider implements it."""
    source: str = "x"
    """The operand (a tensor, or a list of them) whose device and dtype choose the kernel."""
    results: tuple[str, ...] = ()
    """Names of the results of an operator that returns several."""
    product: bool = False
    """It computes a linear, or several that were merged, with the weight in `weight_codes`."""
    rows: tuple[str, ...] = ()
    """Operands that have a row, or an element, for each output of the weight."""
    columns: tuple[str, ...] = ()
    """Operands that have a column for each output of the weight: they are joined side by side, if at all."""
    joins: bool = False
    """Products of one value may become one whose operands with rows lie one below the other."""
    quantizes: str | None = None
    """The operand of which it returns codes, scale and outliers, where it does nothing else."""
    state: Mapping[str, str] = field(default_factory=dict)
    """Operands that are buffers of an outlier state, with their names in STATE_FIELDS."""
    each: tuple[str, ...] = ()
    """Operands that list an item for each linear that reads one quantization."""


def declare(operator: Any, *, composite: bool = False, **traits: Any) -> None:
    """Records the traits of a custom operator and, for providers to match, the names of its operands.

    Raises PipelineError where a trait names an operand that the schema does not have, or not each result.
    """
    overload = operator._opoverload
    found = Traits(operator._name, composite, **traits)
    _check(found, overload)
    _TRAITS[overload] = _TRAITS[str(overload)] = found
    providers.implements(operator._name, operator._init_fn)
    if not composite:
        providers.declare(operator._name, operator._init_fn)


def _check(traits: Traits, overload: Any) -> None:
    names = {argument.name for argument in overload._schema.arguments}
    named = {traits.source, *traits.rows, *traits.columns, *traits.state, *traits.each}
    named |= {"weight_codes"} if traits.product else set()
    named |= {traits.quantizes} if traits.quantizes else set()
    if unknown := sorted(named - names):
        raise PipelineError(
            f"the traits of mixq::{traits.name} name {', '.join(unknown)}, but its operands are "
            f"{', '.join(argument.name for argument in overload._schema.arguments)}: correct its declare()."
        )
    returned = len(overload._schema.returns)
    if len(traits.results) != (returned if returned > 1 else 0):
        raise PipelineError(
            f"the traits of mixq::{traits.name} name {len(traits.results)} results of {returned}: name each "
            "result of an operator that returns several, and none of one that does not."
        )


def traits_of(target: Any) -> Traits | None:
    """The traits of an operator, given by its overload or by that one's text; None for any other target."""
    return _TRAITS.get(target)
