"""Operands and results by name: what a call of a graph is given and gives, read from its operator's schema.

Works for every operator that has a schema, `aten` ones too. Operators of `mixq::` also name their results.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from mixq_compile.errors import PipelineError, unknown_name
from mixq_compile.ops.traits import traits_of


@dataclass(frozen=True)
class Signature:
    """The operands of one operator, in the order in which a call lists them."""

    operator: str
    """Such as `mixq::mixed_linear`."""
    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    defaults: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """All operands."""
        return self.positional + self.keyword_only

    def check(self, names: Iterable[str]) -> None:
        """Raises OptionError, which lists the operands, where one of the names is none of them."""
        for name in names:
            if name not in self.names:
                raise unknown_name(f"operand of {self.operator}", name, self.names)

    def bind(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What a call gives, by name; operands that it leaves to their defaults are left out.

        Raises PipelineError where it gives more than there are.
        """
        given = tuple(args)
        if len(given) > len(self.positional):
            raise PipelineError(
                f"a call gives {self.operator} {len(given)} operands in order, but it takes "
                f"{len(self.positional)}: {', '.join(self.positional)}."
            )
        self.check(kwargs)
        return {**dict(zip(self.positional, given, strict=False)), **kwargs}

    def arrange(self, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call by position, and those that can only be given by name.

        Raises OptionError for an unknown name, PipelineError where an operand without default is missing.
        """
        self.check(named)
        missing = [name for name in self.names if name not in named and name not in self.defaults]
        if missing:
            raise PipelineError(
                f"a call of {self.operator} lacks {', '.join(missing)}: give each operand that has no "
                f"default. It takes {', '.join(self.names)}."
            )
        count = max((place for place, name in enumerate(self.positional, 1) if name in named), default=0)
        args = [named[name] if name in named else self.defaults[name] for name in self.positional[:count]]
        return tuple(args), {name: named[name] for name in self.keyword_only if name in named}

    def select(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of what is given for several operators, the operands of this one."""
        return {name: given[name] for name in self.names if name in given}

    def pick(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call in order, of what is given for several operators.

        For operators without keyword-only operands. Raises PipelineError where an operand without default
        is missing.
        """
        try:
            if not self.defaults or given.keys().isdisjoint(self._optional):
                return self._picked(given)
        except KeyError:  # one is missing: said below
            pass
        return self.arrange(self.select(given))[0]

    @functools.cached_property
    def required(self) -> int:
        """How many operands come first that have no default."""
        return sum(name not in self.defaults for name in self.positional)

    @functools.cached_property
    def _optional(self) -> frozenset[str]:
        return frozenset(self.defaults)

    @functools.cached_property
    def _picked(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        if self.keyword_only or self.required < 2:  # itemgetter returns no tuple of one
            raise PipelineError(f"{self.operator} has keyword-only operands, or fewer than two.")
        return operator.itemgetter(*self.positional[: self.required])


@functools.lru_cache(maxsize=1024)
def signature_of(target: Any) -> Signature:
    """The signature of an operator. Raises PipelineError where the target has no schema."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        raise PipelineError(
            f"{target} is no operator with a schema, so that its operands have no names: read what it is "
            "given with `captured_argument`."
        )
    arguments = schema.arguments
    return Signature(
        operator=schema.name,
        positional=tuple(argument.name for argument in arguments if not argument.kwarg_only),
        keyword_only=tuple(argument.name for argument in arguments if argument.kwarg_only),
        defaults={
            argument.name: argument.default_value for argument in arguments if argument.has_default_value()
        },
    )


def given_operands(node: Node) -> dict[str, Any]:
    """The operands that a call gives, by name, without those that it leaves to their defaults."""
    return signature_of(node.target).bind(node.args, node.kwargs)


def operands(node: Node) -> dict[str, Any]:
    """All operands of a call by name, defaults included, in the order of the schema."""
    signature = signature_of(node.target)
    given = {**signature.defaults, **signature.bind(node.args, node.kwargs)}
    return {name: given[name] for name in signature.names if name in given}


def operand(node: Node, name: str) -> Any:
    """One operand of a call: a node, a constant, a list of them, or None.

    Raises OptionError, which lists the operands, for an unknown name.
    """
    signature = signature_of(node.target)
    signature.check((name,))
    return {**signature.defaults, **signature.bind(node.args, node.kwargs)}[name]


def set_operands(node: Node, **changed: Any) -> None:
    """Gives a call other operands in place; all that are not named stay as they are.

    Raises OptionError, which lists the operands, for an unknown name.
    """
    node.args, node.kwargs = signature_of(node.target).arrange({**given_operands(node), **changed})


def operands_for(target: Any, node: Node) -> dict[str, Any]:
    """What a call gives that another operator takes too, under the same names: for one in its place."""
    return signature_of(target).select(given_operands(node))


def operands_without_place(target: Any, node: Node, replaced: Collection[str] = ()) -> tuple[str, ...]:
    """Operands that matter to a call and that another operator does not take: it cannot stand in its place.

    `replaced` are those that the other has no need of. What has its default does not matter.
    """
    signature, names = signature_of(node.target), {*signature_of(target).names, *replaced}
    return tuple(
        name
        for name, value in given_operands(node).items()
        if name not in names and not (name in signature.defaults and value is signature.defaults[name])
    )


def listed_operands(node: Node) -> dict[str, list[Any]]:
    """The operands of a `mixq::` call that list an item for each linear, by name."""
    traits = traits_of(node.target)
    return {name: list(operand(node, name)) for name in traits.each} if traits is not None else {}


# Results ---------------------------------------------------------------------------------------


def result_place(target: Any, name: str) -> int:
    """The place of a named result among those of an operator. Raises OptionError for an unknown name."""
    traits = traits_of(target)
    names = traits.results if traits is not None else ()
    if name not in names:
        raise unknown_name(f"result of {target}", name, names)
    return names.index(name)


def results(node: Node) -> list[tuple[str, Node]]:
    """The getitem nodes that read the results of a `mixq::` operator, each with its result's name."""
    traits = traits_of(node.target)
    names = traits.results if traits is not None else ()
    return [(names[reader.args[1]], reader) for reader in node.users if names and _is_item_of(reader, node)]  # type: ignore[index]


def result(node: Node, name: str) -> Node | None:
    """The first getitem node that reads a named result; None where nothing reads it."""
    result_place(node.target, name)
    return next((reader for found, reader in results(node) if found == name), None)


def producer(item: Any) -> Node | None:
    """The call whose result a getitem node is; None for anything else."""
    if isinstance(item, Node) and item.target is operator.getitem and isinstance(item.args[0], Node):
        return item.args[0]
    return None


def _is_item_of(reader: Node, node: Node) -> bool:
    return producer(reader) is node
