"""`mixq quantize` of a directory: from file to file, with progress."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.cli.output import console, print_json, print_table
from mixq_compile.errors import MixqError

if TYPE_CHECKING:
    from mixq_compile.runtime.directory_plan import DirectoryPlan
    from mixq_compile.runtime.directory_quantization import DirectoryQuantization, DirectorySizes

GIGABYTE = 1e9
SECONDS_BETWEEN_LINES = 2.0
TRIAL_ROWS = 2048
TRIAL_COLUMNS = 4096


@dataclass(frozen=True)
class ByFile:
    """How a directory is quantized from file to file."""

    overwrite: bool
    dry_run: bool
    verify: bool
    shard_bytes: int
    json: bool


def quantize_by_file(
    source: Path, output: Path, options: Mapping[str, Any], device: str, run: ByFile
) -> None:
    """Plans, and unless told otherwise writes, a quantized directory; says what came of it."""
    from mixq_compile.cli.models import resolve_device
    from mixq_compile.runtime.directory_plan import plan_directory
    from mixq_compile.runtime.directory_quantization import DirectoryQuantization, clear
    from mixq_compile.runtime.options import MixqOptions

    target = resolve_device(device)
    chosen = MixqOptions.from_user(options={"force": True, **options})
    chosen.check_codes_only("a checkpoint frees")
    plan = plan_directory(source, chosen, target)
    if not plan.quantization.linears:
        reasons = Counter(entry.skip for entry in plan.quantization.left_alone.values())
        raise MixqError(
            f"none of the linears of {source} can be quantized, so nothing was written: "
            + "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3))
        )
    making = DirectoryQuantization(plan, output, run.shard_bytes)
    if run.verify and (output / "config.json").is_file():
        _verify(output)
        return
    sizes = making.sizes()
    if run.dry_run:
        _print_dry_run(plan, sizes, output, _seconds(plan, target), as_json=run.json)
        return
    if run.overwrite and output.is_dir():
        clear(output)
    shown = _Progress(plan.source_bytes)
    making.run(device=target, progress=shown, verify=run.verify)
    _print(plan, making, output, shown, as_json=run.json)


def _verify(output: Path) -> None:
    from mixq_compile.runtime.checkpoint_loading import checked

    checked(output, verify=True)
    console().print(f"{output} holds the bytes that were written", markup=False)


def _seconds(plan: DirectoryPlan, device: Any) -> float:
    """About how long quantizing takes, from a few rows of the first linear's shape."""
    import torch

    from mixq_compile.checkpoints.file_quantization import quantized_rows

    linear = next(step.linear for step in plan.steps if step.linear is not None)
    columns = linear.stored.in_features
    rows = max(1, min(linear.stored.out_features, TRIAL_ROWS * TRIAL_COLUMNS // columns))
    dtype = getattr(torch, linear.stored.dtype)
    block = torch.randn(rows, columns, dtype=torch.float32, device="cpu").to(dtype)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        quantized_rows(block, linear, device)
        seconds.append(time.perf_counter() - begin)
    weights = sum(
        step.linear.stored.out_features * step.linear.stored.in_features
        for step in plan.steps
        if step.linear is not None
    )
    return weights / (rows * columns) * min(seconds)


class _Progress:
    """Shows bytes, linears and errors on stderr: each linear on a terminal, elsewhere some."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.begin = self.said = time.perf_counter()
        self.errors: dict[str, float] = {}
        self._target = console(stderr=True)

    def __call__(self, nbytes: int, linear: str, error: float | None) -> None:
        self.done += nbytes
        if linear and error is not None:
            self.errors[linear] = error
        now = time.perf_counter()
        if not linear or now - self.said < SECONDS_BETWEEN_LINES:
            return
        self.said = now
        left = (now - self.begin) / max(self.done, 1) * (self.total - self.done)
        self._target.print(
            f"{self.done / GIGABYTE:.2f} of {self.total / GIGABYTE:.2f} GB, about {left:.0f} s left; "
            f"{linear}: relative error {error:.4f}",
            style="dim",
            markup=False,
        )

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.begin


def _rows(plan: DirectoryPlan) -> list[tuple[str, str, str]]:
    stored = plan.quantization
    counts: Counter[tuple[str, str]] = Counter()
    for linear in stored.linears.values():
        counts[linear.scheme.name, ""] += 1
    for entry in stored.left_alone.values():
        counts["left alone", entry.skip] += 1
    return [(what, str(count), why) for (what, why), count in counts.most_common()]


def _facts(plan: DirectoryPlan, sizes: DirectorySizes, output: Path) -> dict[str, Any]:
    stored = plan.quantization
    return {
        "directory": str(output),
        "bytes_before": sizes.source_bytes,
        "bytes_after": sizes.output_bytes,
        "shards": sizes.shards,
        "quantized": {name: linear.scheme.name for name, linear in stored.linears.items()},
        "left_alone": {name: entry.skip for name, entry in stored.left_alone.items()},
    }


def _print_dry_run(
    plan: DirectoryPlan, sizes: DirectorySizes, output: Path, seconds: float, *, as_json: bool
) -> None:
    if as_json:
        free = {"bytes_missing": sizes.missing_bytes, "bytes_free": sizes.free_bytes}
        print_json({**_facts(plan, sizes, output), **free, "seconds": seconds, "written": False})
        return
    target = console()
    print_table(target, f"{output} would hold", ("", "linears", "why"), _rows(plan))
    target.print(
        f"{sizes.source_bytes / GIGABYTE:.2f} GB would become {sizes.output_bytes / GIGABYTE:.2f} GB "
        f"({sizes.output_bytes / sizes.source_bytes:.4f}) in {sizes.shards} files; "
        f"{sizes.missing_bytes / GIGABYTE:.2f} GB are to be written, {sizes.free_bytes / GIGABYTE:.2f} GB "
        f"are free; quantizing takes about {seconds:.0f} s, beside reading and writing",
        markup=False,
    )


def _print(
    plan: DirectoryPlan, making: DirectoryQuantization, output: Path, shown: _Progress, *, as_json: bool
) -> None:
    sizes = making.sizes()
    if as_json:
        print_json(
            {
                **_facts(plan, sizes, output),
                "seconds": shown.seconds,
                "relative_errors": shown.errors,
                "written": True,
            }
        )
        return
    target = console()
    print_table(target, f"{output} holds", ("", "linears", "why"), _rows(plan))
    if shown.errors:
        worst = max(shown.errors, key=lambda name: shown.errors[name])
        target.print(f"largest relative error of a weight: {shown.errors[worst]:.4f} ({worst})", markup=False)
    target.print(
        f"{sizes.source_bytes / GIGABYTE:.2f} GB became {sizes.output_bytes / GIGABYTE:.2f} GB "
        f"({sizes.output_bytes / sizes.source_bytes:.4f}) in {shown.seconds:.1f} s, in {sizes.shards} files",
        markup=False,
    )
    target.print(
        f'load it: import mixq_compile; AutoModel….from_pretrained("{output}")   measure it: mixq eval '
        f"{output} --text FILE",
        markup=False,
    )
