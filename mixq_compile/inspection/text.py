"""Terminal views of a history; rich is imported when one is asked for, and respects NO_COLOR."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mixq_compile.inspection.patch import PatchLine, hunks, patch
from mixq_compile.inspection.program import program_line, program_text
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.pipeline.history import History, PassRecord

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

NAMES_SHOWN = 2
STYLES = {"-": "red", "+": "green", " ": "dim"}


def every_node(row: NodeRow) -> bool:
    """Wants every node."""
    return True


def print_history(history: History, console: Console | None = None) -> None:
    """Prints what each pass did: time, nodes added, removed and changed, decisions, findings."""
    _console(console).print(history_table(history))


def print_program(snapshot: Snapshot, console: Console | None = None) -> None:
    """Prints a graph as a Python program, one line a node, with type, shape, scheme and origin."""
    from rich.text import Text

    _console(console).print(Text(program_text(snapshot)), soft_wrap=True, end="")


def print_diff(diff: GraphDiff, console: Console | None = None) -> None:
    """Prints the nodes that a difference removes, adds and changes, without what is around them."""
    lines = [PatchLine("-", row) for row in diff.removed] + [PatchLine("+", row) for row in diff.added]
    for old, new in diff.changed:
        lines += [PatchLine("-", old), PatchLine("+", new)]
    _print_lines(lines, _console(console))


def print_patch(
    before: Snapshot,
    diff: GraphDiff,
    wanted: Callable[[NodeRow], bool] = every_node,
    console: Console | None = None,
) -> int:
    """Prints wanted changes in the order of the program, with lines around them.

    Returns how many nodes were printed as removed or added; a changed one is both.
    """
    target, printed = _console(console), 0
    for hunk in hunks(patch(before, diff), wanted):
        target.print(f"@@ {_names(hunk)}", style="cyan", markup=False, soft_wrap=True)
        _print_lines(hunk, target)
        printed += sum(line.sign != " " for line in hunk)
    return printed


def _names(hunk: list[PatchLine]) -> str:
    """The layers that a hunk changes, the first few by name."""
    names = list(dict.fromkeys(line.row.fqn for line in hunk if line.sign != " " and line.row.fqn))
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _print_lines(lines: list[PatchLine], target: Console) -> None:
    for line in lines:
        target.print(_line(line), soft_wrap=True)


def history_table(history: History) -> RenderableType:
    """The table of passes, the captured graph first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=_caption(history), caption_justify="left")
    table.add_column("#", justify="right")
    names = [record.spec.partition("{")[0] for record in history.records]
    # A name is never broken; what options stand behind it may be.
    table.add_column("pass", overflow="fold", min_width=max(map(len, names), default=4))
    for heading in ("ms", "nodes", "applied", "skipped", "noted"):
        table.add_column(heading, justify="right", no_wrap=True)
    has_findings = any(map(_findings, history.records))
    if has_findings:
        table.add_column("findings", overflow="fold")
    if history.initial is not None:
        table.add_row("0", Text("as captured", style="dim"), "", str(len(history.initial.rows)))
    for record in history.records:
        counts = (str(record.count(verdict) or "") for verdict in ("applied", "skipped", "noted"))
        cells = (str(record.index), record.spec, f"{record.milliseconds:.1f}", node_changes(record), *counts)
        table.add_row(*(Text(cell) for cell in (*cells, *([_findings(record)] if has_findings else []))))
    return table


def node_changes(record: PassRecord) -> str:
    """How many nodes a pass added, removed and changed, such as `+3 -1 ~2`; `=` where none."""
    if record.diff is None:
        return ""
    parts = ((len(record.diff.added), "+"), (len(record.diff.removed), "-"), (len(record.diff.changed), "~"))
    return " ".join(f"{sign}{number}" for number, sign in parts if number) or "="


def operator_changes(history: History) -> list[tuple[str, int, int]]:
    """Operators that a history calls more or less often: name, times before, times after; largest first."""
    if history.initial is None:
        return []
    before, after = history.initial.op_counts(), history.final.op_counts()
    changed = [
        (name, before.get(name, 0), after.get(name, 0))
        for name in before | after
        if before.get(name, 0) != after.get(name, 0)
    ]
    return sorted(changed, key=lambda entry: (-abs(entry[2] - entry[1]), entry[0]))


def _console(console: Console | None) -> Console:
    from rich.console import Console

    return console if console is not None else Console(highlight=False, emoji=False)


def _line(line: PatchLine) -> Text:
    """A line of a patch; the type behind it is dim, so that the change stands out."""
    from rich.text import Text

    statement, sign, notes = program_line(line.row).partition("  # ")
    text = Text(f"{line.sign} {statement}", style=STYLES[line.sign])
    return text.append(sign + notes, style="dim")


def _findings(record: PassRecord) -> str:
    found = [violation.message for violation in record.violations]
    return "; ".join([*found, *(["fuel spent"] if record.stopped else [])])


def _caption(history: History) -> str:
    milliseconds = sum(record.milliseconds for record in history.records)
    text = f"{len(history.records)} passes, {milliseconds:.0f} ms"
    if history.initial is None:
        return text
    return f"{text}; {len(history.initial.rows)} nodes before, {len(history.final.rows)} after"
