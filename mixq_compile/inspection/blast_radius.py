"""Which layers each pass touched: layers down, passes across."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mixq_compile.inspection.layers import LayerSummary
from mixq_compile.ir.snapshot import NodeRow
from mixq_compile.pipeline.history import PassRecord


@dataclass(frozen=True)
class Touch:
    """What one pass did to one layer."""

    added: int = 0
    removed: int = 0
    changed: int = 0
    applied: int = 0
    """Decisions that were carried out."""
    skipped: int = 0
    """Decisions to leave something alone."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.applied or self.skipped)

    @property
    def mark(self) -> str:
        """The touch in a few characters: `+3 -1 ~2`, `kept` where the pass left the layer alone."""
        counts = ((self.added, "+"), (self.removed, "-"), (self.changed, "~"))
        nodes = " ".join(f"{sign}{count}" for count, sign in counts if count)
        return nodes or ("kept" if self.skipped else "")


def layer_of(fqn: str, layers: Iterable[str]) -> str | None:
    """The layer that a node's name lies in: itself, or the one that it is a part of."""
    known = layers if isinstance(layers, (set, frozenset, dict)) else set(layers)
    while fqn:
        if fqn in known:
            return fqn
        fqn = fqn.rpartition(".")[0]
    return None


def touches(record: PassRecord, layers: Iterable[LayerSummary]) -> dict[str, Touch]:
    """What a pass did to each of these layers; layers that it did not touch are left out."""
    known = {layer.fqn: dict.fromkeys(("added", "removed", "changed", "applied", "skipped"), 0)
             for layer in layers}  # fmt: skip

    def count(kind: str, fqns: Iterable[str]) -> None:
        for fqn in {layer_of(name, known) for name in fqns}:
            if fqn is not None:
                known[fqn][kind] += 1

    if record.diff is not None:
        for kind, rows in (
            ("added", record.diff.added),
            ("removed", record.diff.removed),
            ("changed", tuple(new for _, new in record.diff.changed)),
        ):
            for row in rows:
                count(kind, _names(row))
    for decision in record.decisions:
        if decision.verdict in ("applied", "skipped"):
            count(decision.verdict, [decision.fqn])
    return {fqn: touch for fqn, counts in known.items() if (touch := Touch(**counts))}


def _names(row: NodeRow) -> Iterator[str]:
    """The layers that a node names: its own, or all that a product of several stands for."""
    members = row.annotations.get("members")
    if members:
        yield from (member.get("fqn", "") for member in members)
    else:
        yield row.fqn
