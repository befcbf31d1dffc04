"""Terminal views of a history; rich is imported when one is asked for, and respects NO_COLOR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.pipeline.history import History, PassRecord

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text


def print_history(history: History, console: Console | None = None) -> None:
    """Prints what each pass did: time, nodes added, removed and changed, decisions, findings."""
    _console(console).print(history_table(history))


def print_program(snapshot: Snapshot, console: Console | None = None) -> None:
    """Prints a graph as a program, one line a node, with type, shape and scheme."""
    target = _console(console)
    for row in snapshot.rows:
        target.print(_line(row), soft_wrap=True)


def print_diff(diff: GraphDiff, console: Console | None = None) -> None:
    """Prints the nodes that a pass removed, added and changed, as a patch does."""
    target = _console(console)
    for row in diff.removed:
        target.print(_line(row, "- ", "red"), soft_wrap=True)
    for row in diff.added:
        target.print(_line(row, "+ ", "green"), soft_wrap=True)
    for old, new in diff.changed:
        target.print(_line(old, "- ", "red"), soft_wrap=True)
        target.print(_line(new, "+ ", "green"), soft_wrap=True)


def program_line(row: NodeRow) -> str:
    """One node as a line: what it computes, its type and shape, its scheme."""
    scheme = row.annotations.get("scheme")
    return f"{row.line}  [{scheme}]" if scheme else row.line


def history_table(history: History) -> RenderableType:
    """The table of passes."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=_caption(history), caption_justify="left")
    table.add_column("#", justify="right")
    table.add_column("pass", overflow="fold")
    for heading in ("ms", "nodes", "applied", "skipped", "noted"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("findings", overflow="fold")
    for record in history.records:
        counts = (str(record.count(verdict) or "") for verdict in ("applied", "skipped", "noted"))
        cells = (str(record.index), record.spec, f"{record.milliseconds:.1f}", _nodes(record), *counts)
        table.add_row(*(Text(cell) for cell in cells), Text(_findings(record)))
    return table


def _console(console: Console | None) -> Console:
    from rich.console import Console

    return console if console is not None else Console()


def _line(row: NodeRow, prefix: str = "", style: str = "") -> Text:
    from rich.text import Text

    return Text(prefix + program_line(row), style=style)


def _nodes(record: PassRecord) -> str:
    if record.diff is None:
        return ""
    parts = ((len(record.diff.added), "+"), (len(record.diff.removed), "-"), (len(record.diff.changed), "~"))
    return " ".join(f"{sign}{number}" for number, sign in parts if number) or "="


def _findings(record: PassRecord) -> str:
    found = [violation.message for violation in record.violations]
    return "; ".join([*found, *(["fuel spent"] if record.stopped else [])])


def _caption(history: History) -> str:
    milliseconds = sum(record.milliseconds for record in history.records)
    text = f"{len(history.records)} passes, {milliseconds:.0f} ms"
    if history.initial is None:
        return text
    return f"{text}; {len(history.initial.rows)} nodes before, {len(history.final.rows)} after"
