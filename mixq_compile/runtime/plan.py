"""From options to a pipeline: which passes run, and with which of their options."""

from __future__ import annotations

from typing import Any

import torch

from mixq_compile import ops  # noqa: F401  # defines torch.ops.mixq
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Pipeline
from mixq_compile.runtime.options import MixqOptions

_DEFAULTS = MixqOptions()
_HASH_LENGTH = 16


def _pass_options(options: MixqOptions) -> dict[str, dict[str, Any]]:
    """What each pass is told, by the names of its options."""
    return {
        "select-scheme": {
            "default": options.scheme,
            "ignore": options.ignore,
            "layers": tuple(f"{pattern}={name}" for pattern, name in options.layers),
            "threshold": options.threshold,
            "capacity": options.capacity,
            "miss": options.miss,
            "force": options.force,
            "kernel": options.kernel,
            "merge_siblings": options.merge_siblings,
        },
        "annotate-outliers": {"stats": options.stats.sha256()[:_HASH_LENGTH] if options.stats else None},
        "rewrite-mixed-linear": {
            "originals": not options.release_weights,
            "batch_invariant": options.batch_invariant,
            "kernel": options.kernel,
        },
        "merge-siblings": {"when": options.merge_siblings, "kernel": options.kernel},
        "select-kernels": {"kernel": options.kernel},
    }


def default_pipeline(graph: CapturedGraph, ordinary: str = "jit") -> str:
    """The pipeline of a graph: that of a model whose linears `quantize` swapped, or an ordinary one's."""
    swapped = any(node.target is torch.ops.mixq.linear.default for node in graph.graph.nodes)
    return "swapped" if swapped else ordinary


def pipeline_for(options: MixqOptions, default: str) -> Pipeline:
    """The pipeline of these options: theirs, or the named default.

    Options that differ from their defaults are told to the passes; the others are as the pipeline's
    text has them.
    """
    pipeline = Pipeline.parse(options.pipeline or default)
    present = {step.name for step in pipeline.passes}
    unchanged = _pass_options(_DEFAULTS)
    for name, given in _pass_options(options).items():
        changes = {key: value for key, value in given.items() if value != unchanged[name][key]}
        if name in present and changes:
            pipeline = pipeline.with_options(name, **changes)
    return pipeline
