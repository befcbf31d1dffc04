"""The README.md of a quantized directory: how it is loaded, what it takes, how it came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mixq_compile.checkpoints.schema import StoredQuantization
from mixq_compile.version import __version__

GIB = 1 << 30
MARK = "<!-- written by mixq-compile -->"
"""A card with this line is ours, and is written again; another's is left as it is."""


def model_card(
    quantization: StoredQuantization, architecture: str, name: str, nbytes: int, original_nbytes: int
) -> str:
    """The text of a card; `name` is the directory's, `original_nbytes` what the model took before."""
    auto = "AutoModelForCausalLM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
    counts = Counter(linear.scheme.name for linear in quantization.linears.values())
    summaries = {linear.scheme.name: linear.scheme.summary for linear in quantization.linears.values()}
    lines = [
        "---", "library_name: transformers", "tags:", "- mixq", "- quantized", "---", MARK, "",
        f"# {name}", "",
        f"A quantized {architecture}, written by mixq-compile {__version__}.", "",
        "```python",
        "import mixq_compile  # registers the format with transformers",
        f"from transformers import {auto}", "",
        f'model = {auto}.from_pretrained("{name}")',
        "```", "",
        "Without `import mixq_compile`, loading ends in an error about shapes.", "",
        "| | |", "|---|---|",
        f"| memory of the weights | {_size(nbytes)}, {nbytes / max(original_nbytes, 1):.3f} of "
        f"{_size(original_nbytes)} before |",
        *(f"| {scheme} | {count} linears: {summaries[scheme]} |" for scheme, count in counts.most_common()),
        *(f"| left alone | {count} × {skip} |" for skip, count in _reasons(quantization).most_common()),
        f"| calibration | {_calibration(quantization.calibration)} |",
        "| accuracy | not measured: `mixq eval` measures it |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _reasons(quantization: StoredQuantization) -> Counter[str]:
    return Counter(entry.skip for entry in quantization.left_alone.values())


def _calibration(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return "none"
    return ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.1f} MiB"
