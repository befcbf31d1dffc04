"""Why a rewrite does not happen, with the nodes that stand in its way: what several passes say alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from mixq_compile.ir.effects import writer_between
from mixq_compile.ops.operands import operands_without_place

MOST_NAMES = 4
"""How many nodes a reason names; the details name all."""
UNLIKE = "with another scheme, policy or columns"


@dataclass(frozen=True)
class Obstacle:
    """Why a rewrite does not happen."""

    reason: str
    blamed: tuple[str, ...] = ()
    """Names of the nodes that stand in its way; the reason names them too."""

    @property
    def details(self) -> dict[str, Any]:
        """What a decision records beside the reason."""
        return {"blamed": list(self.blamed)} if self.blamed else {}

    @classmethod
    def of(cls, what: str, blamed: Iterable[Node]) -> Obstacle:
        """An obstacle whose reason ends with the names of the nodes that are blamed."""
        names = tuple(dict.fromkeys(node.name for node in blamed))
        if not names:
            return cls(what)
        more = len(names) - MOST_NAMES
        listed = ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        return cls(f"{what}: {listed}", names)


def other_readers(what: str, nodes: Iterable[Node], expected: Collection[Node]) -> Obstacle | None:
    """The obstacle that something beside `expected` reads one of the nodes; None where nothing does."""
    others = [reader for node in nodes for reader in node.users if reader not in expected]
    return Obstacle.of(f"something else reads {what}", others) if others else None


def no_place_for_operands(target: Any, node: Node, replaced: Collection[str] = ()) -> Obstacle | None:
    """The obstacle that another operator in a call's place would lose an operand; None where none is lost."""
    lost = operands_without_place(target, node, replaced)
    return Obstacle(f"{target} has no place for its {', '.join(lost)}") if lost else None


def written_between(value: Node, first: Node, last: Node, which: str) -> Obstacle | None:
    """The obstacle that a call between two nodes may change a value in place; None where none does."""
    writer = writer_between(value, first, last)
    return Obstacle.of(f"the value is changed in place between {which}", [writer]) if writer else None
