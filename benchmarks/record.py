"""Writes the JSON of a `mixq … --json` call to benchmarks/results, with versions, processor and commit.

mixq demo --json | python benchmarks/record.py demo_cpu
mixq eval MODEL --text FILE --protocol stories --json | python benchmarks/record.py perplexity_stories
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PATHS = ("model", "text")
"""Values that may be paths: only their last part is kept."""


def processor() -> str:
    """The processor's name, or the machine type where it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def environment() -> dict[str, str]:
    """Processor, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """Reads JSON from standard input and writes one result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="name of the result file, without .json")
    arguments = parser.parse_args()
    measured: dict[str, Any] = json.load(sys.stdin)
    for key in PATHS:
        if isinstance(measured.get(key), str):
            measured[key] = Path(measured[key]).name
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{arguments.name}.json"
    target.write_text(json.dumps({"environment": environment(), **measured}, indent=1) + "\n")
    print(f"wrote {target.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
