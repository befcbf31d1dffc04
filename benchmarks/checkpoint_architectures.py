"""Quantizes tiny configurations by module and by file, and writes results/checkpoint_architectures.json.

python -m benchmarks.checkpoint_architectures
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import transformers

from benchmarks.record import RESULTS, environment
from tests.models.checkpoint_architectures import SETTINGS, outcome_of


def main() -> None:
    """Runs all configurations, one line each."""
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for architecture in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = outcome_of(architecture, Path(folder))
        print(outcome, flush=True)
        rows.append(dataclasses.asdict(outcome))
    facts = {**environment(), "transformers": transformers.__version__}
    target = RESULTS / "checkpoint_architectures.json"
    target.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
