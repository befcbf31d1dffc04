"""Runs a benchmark: progress to stderr, the result to stdout or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.benchmarking.choices import Announce
from mixq_compile.cli.models import resolve_device
from mixq_compile.cli.output import check_folder, console, print_json

if TYPE_CHECKING:
    from mixq_compile.benchmarking.results import Document


def run(
    benchmark: Callable[..., Document],
    options: Any,
    *,
    device: str,
    output: Path | None,
    commit: str,
    json: bool,
) -> None:
    """Measures, then prints the result, or writes it into a folder and says where."""
    import torch

    if output is not None:
        check_folder("--output", output)
    target = resolve_device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target.index or 0)
        target = torch.device("cuda", torch.cuda.current_device())
    with progress() as announce:
        document = benchmark(options, target, announce, commit)
    if output is not None:
        written, note = document.write(output)
        said = console(stderr=True)
        for path in written:
            said.print(f"wrote {path}", markup=False, style="dim", soft_wrap=True)
        if note:
            said.print(f"note: {note}", markup=False, soft_wrap=True)
    if json:
        print_json(document.to_json())
    elif output is None:
        print(document.markdown())


@contextmanager
def progress() -> Iterator[Announce]:
    """A bar on a terminal; elsewhere one line for each case."""
    target = console(stderr=True)
    if not target.is_terminal:

        def say(done: int, total: int, what: str) -> None:
            target.print(f"[{done + 1}/{total}] {what}", style="dim", markup=False)

        yield say
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=target, transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield advance
