"""Layers that are alike but for their number: one line for all of them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Alike:
    """Layers with one pattern and equal properties."""

    pattern: str
    """The name with `*` for its numbers; the name itself for a single layer."""
    fqns: tuple[str, ...]

    @property
    def label(self) -> str:
        """The pattern, and how many layers it stands for."""
        return f"{self.pattern} ×{len(self.fqns)}" if len(self.fqns) > 1 else self.pattern


def group_alike(properties: Mapping[str, Hashable]) -> list[Alike]:
    """Groups layers whose names differ in numbers only and whose properties are equal, in order."""
    groups: dict[tuple[str, Hashable], list[str]] = {}
    for fqn, value in properties.items():
        groups.setdefault((_NUMBER.sub("*", fqn), value), []).append(fqn)
    return [
        Alike(pattern if len(fqns) > 1 else fqns[0], tuple(fqns)) for (pattern, _), fqns in groups.items()
    ]
