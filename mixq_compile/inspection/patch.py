"""The difference of two snapshots in the order of the program, as a patch shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot

Sign = Literal["-", "+", " "]
CONTEXT = 2


@dataclass(frozen=True)
class PatchLine:
    """One node that was removed (-), added (+) or stayed ( ); a changed one is two lines."""

    sign: Sign
    row: NodeRow


def patch(before: Snapshot, diff: GraphDiff) -> list[PatchLine]:
    """All nodes of both snapshots, in the order in which they run."""
    after = diff.apply(before)
    moved = set(diff.moved)
    staying = {row.name for row in after.rows if row.name in before.by_name and row.name not in moved}
    lines: list[PatchLine] = []
    old_rows, place = before.rows, 0
    pending: list[PatchLine] = []
    for row in after.rows:
        if row.name not in staying:
            pending.append(PatchLine("+", row))
            continue
        while old_rows[place].name != row.name:
            lines.append(PatchLine("-", old_rows[place]))
            place += 1
        lines += pending
        pending.clear()
        old = old_rows[place]
        place += 1
        lines += [PatchLine(" ", row)] if old == row else [PatchLine("-", old), PatchLine("+", row)]
    lines += [PatchLine("-", row) for row in old_rows[place:]]
    return lines + pending


def hunks(
    lines: Sequence[PatchLine], wanted: Callable[[NodeRow], bool], context: int = CONTEXT
) -> Iterator[list[PatchLine]]:
    """The stretches of a patch that hold wanted changes, with so many lines around each."""
    kept = [line.sign != " " and wanted(line.row) for line in lines]
    near: set[int] = set()
    for place in (place for place, keep in enumerate(kept) if keep):
        near.update(range(max(0, place - context), min(len(lines), place + context + 1)))
    hunk: list[PatchLine] = []
    last = -2
    for place in sorted(near):
        if place != last + 1 and hunk:
            yield hunk
            hunk = []
        # A change that is not wanted is no context either.
        if kept[place] or lines[place].sign == " ":
            hunk.append(lines[place])
        last = place
    if hunk:
        yield hunk
