"""What the authors of LQER published about area, to be shown beside an estimate and never mixed into it."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Zhang et al., LQER: Low-Rank Quantization Error Reconstruction for LLMs, ICML 2024"
SETTING = (
    "high-level synthesis for an Alveo U250; 16 lanes along K; X (1, 4096), W (4096, 11008); LUTs, one DSP "
    "block counted as 100; relative to FP16, which took 6125"
)
ROWS, IN_FEATURES, OUT_FEATURES = 1, 4096, 11008
HIGH_PRECISION_COLUMNS = 353
FP16_LUTS = 6125
CAVEATS = (
    "a divider in every lane of the casts",
    "accumulators that are truncated",
    "folding that differs from circuit to circuit",
)
"""Why these ratios are no target: what is in those circuits that a structural model does not have."""


@dataclass(frozen=True)
class PublishedArea:
    """One row of the table."""

    name: str
    relative: float
    """To FP16 in the same setting."""
    scheme: str | None
    """The scheme here that is nearest; None where there is none."""


TABLE = (
    PublishedArea("FP16", 1.0, "fp16"),
    PublishedArea("LLM.int4, 353 high-precision columns", 21.23, "llm_int4"),
    PublishedArea("GPTQ W4", 13.99, "gptq"),
    PublishedArea("AWQ W4", 13.99, "awq"),
    PublishedArea("fixed point W6A6", 0.386, None),
    PublishedArea("fixed point W4A8", 0.451, None),
    PublishedArea("LQER-INT", 1.136, "lqer_int4"),
    PublishedArea("LQER-MXINT W4A8", 0.325, "lqer_mxint4"),
    PublishedArea("LQER-MXINT W4A6", 0.229, None),
)


def published_area(scheme: str) -> float | None:
    """The published area of a scheme relative to FP16; None where nothing was published."""
    return next((row.relative for row in TABLE if row.scheme == scheme), None)
