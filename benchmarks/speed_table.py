"""Makes the package's table of speed-ups from benchmarks/results: `python benchmarks/speed_table.py`.

Later files replace what earlier ones say of the same shape and rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixq_compile.kernels.tl.speed_table import SHIPPED, SpeedTable

RESULTS = Path(__file__).parent / "results"
DEVICE = "NVIDIA H200"
SINGLE_LINEARS = {"linear_h200": 8, "linear_h200_int4": 4}
KERNEL_BENCHMARKS = {"kernels_h200": 8, "kernels_h200_int4": 4, "kernels_middle_h200": 8}


def main() -> None:
    """Writes the table of the H200."""
    table = SpeedTable(DEVICE)
    for name, bits in SINGLE_LINEARS.items():
        for row in json.loads((RESULTS / f"{name}.json").read_text())["results"]:
            table.add((bits, row["N"], row["K"]), row["M"], row["speedup"])
    for name, bits in KERNEL_BENCHMARKS.items():
        for case in json.loads((RESULTS / f"{name}.json").read_text())["cases"]:
            shape = (bits, case["out_features"], case["in_features"])
            table.add(shape, case["rows"], case["whole_speedup"]["bf16"])
    SHIPPED.mkdir(exist_ok=True)
    target = SHIPPED / "nvidia-h200.json"
    target.write_text(json.dumps(table.to_json(), indent=1) + "\n")
    print(f"wrote {target.relative_to(Path.cwd())}: {len(table.entries)} shapes")


if __name__ == "__main__":
    main()
