"""Makes the tables of README.md and docs/models.md from benchmarks/results; run after measuring.

`python benchmarks/readme_tables.py` writes them; with `--check` it fails where one is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return loaded


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo() -> str:
    """all-MiniLM-L6-v2 on a CPU."""
    found = _load("demo_cpu")
    where = found["environment"]
    rows = [
        [
            row["label"], f"{row['milliseconds']:.0f} ms", f"{row['speedup_over_eager']:.2f}×",
            f"{row['speedup_over_inductor']:.2f}×", f"{row['linear_bytes'] / 2**20:.1f} MiB",
            f"{row['relative_error']:.4f}", f"{row['cosine']:.4f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    title = (
        f"**An encoder on a CPU.** all-MiniLM-L6-v2, {found['batch']} × {found['length']} tokens, on "
        f"{where['threads']} threads of an {where['processor']}, medians of interleaved calls (`mixq demo`):"
    )
    header = ["", "time", "over eager", "over Inductor", "linears", "relative error", "cosine"]
    return f"{title}\n\n{_markdown(header, rows)}"


def linear() -> str:
    """One linear on an H200."""
    found = _load("linear_h200")
    rows = [
        [
            f"{row['N']} × {row['K']}", str(row["M"]), f"{row['bf16_us']:.0f} µs", f"{row['mixq_us']:.0f} µs",
            f"{row['speedup']:.2f}×", f"{row['bf16_error']:.4f}", f"{row['originals_error']:.4f}",
            f"{row['codes_error']:.4f}",
        ]
        for row in found["results"]
        if row["M"] in (1, 16, 64, 256, 1024, 4096) and row["N"] * row["K"] >= 11008 * 4096
    ]  # fmt: skip
    title = (
        f"**One linear on a GPU.** `w8a8o16` with {found['outliers']['columns']} outlier columns, "
        f"{found['outliers']['size']:.0f} times the rest, on an {found['device']} beside bf16 (cuBLAS), both "
        "in a CUDA graph, L2 flushed, quantization and check included (`benchmarks/linear_gpu.py`); errors "
        "against float64, with outlier weights from their 16-bit originals (the default) and rebuilt "
        "from codes:"
    )
    header = ["N × K", "M", "bf16", "mixq", "speed-up", "error bf16", "error mixq", "error mixq, from codes"]
    return f"{title}\n\n{_markdown(header, rows)}"


def perplexity() -> str:
    """A trained language model on text that calibration has not seen."""
    found = _load("perplexity_stories")

    def cells(row: dict[str, Any]) -> list[str]:
        share = row["outlier_share"]
        return [
            row["label"], f"{row['perplexity']:.3f}",
            "–" if row["delta"] is None else f"{row['delta']:+.3f}",
            "–" if share is None else f"{share['mean']:.1%}, {share['max']:.1%}",
        ]  # fmt: skip

    title = (
        f"**A language model.** {found['model']}, a Llama trained on short stories, over "
        f"{found['documents']} stories ({found['tokens_scored']} tokens), every linear but the head "
        "quantized; the 4-bit schemes are calibrated on other stories "
        "(`mixq eval --protocol stories --force`):"
    )
    header = ["", "perplexity", "over full precision", "columns in full precision: mean, most"]
    return f"{title}\n\n{_markdown(header, [cells(row) for row in found['rows']])}"


def architectures() -> str:
    """What the tests run."""
    found = _load("architectures")
    rows = [
        [
            row["architecture"], str(row["found"]), str(row["quantized"]), row["skipped"] or "–",
            *(f"{row['sqnr'][route]:.1f}" for route in ("backend", "quantize", "export")),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    header = ["architecture", "linears", "quantized", "left alone", "backend", "quantize", "export"]
    return _markdown(header, rows)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "demo": ("README.md", demo),
    "linear": ("README.md", linear),
    "perplexity": ("README.md", perplexity),
    "architectures": ("docs/models.md", architectures),
}


def main() -> int:
    """Writes or checks every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a table is out of date"
    )
    arguments = parser.parse_args()
    stale = []
    for name, (file, make) in TABLES.items():
        path = ROOT / file
        text = path.read_text()
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{file} has no place for the table {name!r}")
        made = make()
        updated = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        if updated != text:
            stale.append(f"{name} in {file}")
            if not arguments.check:
                path.write_text(updated)
    if stale:
        print(("out of date: " if arguments.check else "written: ") + ", ".join(stale))
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
