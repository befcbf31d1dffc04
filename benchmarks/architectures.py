"""Prints what each route makes of each tiny architecture, and writes benchmarks/results/architectures.json.

python -m benchmarks.architectures
"""

from __future__ import annotations

import json

import torch
import transformers

from benchmarks.record import RESULTS, environment
from tests.models.architectures import ARCHITECTURES, ROUTES, outcome_of


def main() -> None:
    """Runs all architectures, one line each."""
    rows = []
    for architecture in ARCHITECTURES:
        torch._dynamo.reset()
        outcome = outcome_of(architecture)
        print(outcome, flush=True)
        rows.append(
            {
                "architecture": outcome.architecture,
                "found": outcome.found,
                "quantized": outcome.quantized,
                "skipped": "; ".join(f"{count} × {reason}" for reason, count in outcome.skipped.items()),
                "sqnr": {route: outcome.sqnr[route] for route in ROUTES if route in outcome.sqnr},
                "without": outcome.without,
            }
        )
    facts = {**environment(), "transformers": transformers.__version__}
    target = RESULTS / "architectures.json"
    target.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
