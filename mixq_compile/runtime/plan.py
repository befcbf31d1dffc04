"""From options to a pipeline: which passes run, and with which of their options."""

from __future__ import annotations

from typing import Any

from mixq_compile.pipeline import Pipeline
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.scheme import get_scheme


def _pass_options(options: MixqOptions) -> dict[str, dict[str, Any]]:
    scheme = get_scheme(options.scheme)
    four_bit_activation = scheme.activation is not None and scheme.activation.bits == 4
    return {
        "annotate-outliers": {
            "stats": options.stats.sha256()[:16] if options.stats is not None else None,
            "threshold": options.threshold,
            "capacity": options.capacity,
            "choose": "largest" if four_bit_activation else None,
        },
        "select-scheme": {
            "default": options.scheme,
            "ignore": options.ignore,
            "layers": tuple(f"{pattern}={name}" for pattern, name in options.layers) or None,
            "threshold": options.threshold,
            "capacity": options.capacity,
            "miss": options.miss,
            "force": options.force or None,
            "kernel": None if options.kernel == "auto" else options.kernel,
        },
        "rewrite-mixed-linear": {
            "originals": False if options.release_weights else None,
            "batch_invariant": options.batch_invariant or None,
            "kernel": None if options.kernel == "auto" else options.kernel,
        },
        "select-kernels": {"kernel": None if options.kernel == "auto" else options.kernel},
    }


def pipeline_for(options: MixqOptions, default: str) -> Pipeline:
    """The pipeline of these options: theirs, or the named default, with pass options filled in."""
    pipeline = Pipeline.parse(options.pipeline or default)
    present = {entry.name for entry in pipeline.passes}
    for name, given in _pass_options(options).items():
        changes = {key: value for key, value in given.items() if value is not None}
        if name in present and changes:
            pipeline = pipeline.with_options(name, **changes)
    return pipeline
