"""Inspections of small models, for the tests of views."""

from __future__ import annotations

import functools
from typing import Any

from captures import captured_llama, small_llama

from mixq_compile.inspection.cost import H200
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.pipeline import Fuel, History, PassContext, Pipeline
from mixq_compile.runtime.weight_store import WeightStore

REFERENCE: dict[str, dict[str, Any]] = {
    "select-scheme": {"force": True, "kernel": "ref"},
    "rewrite-mixed-linear": {"kernel": "ref"},
    "select-kernels": {"kernel": "ref"},
}
"""Options under which every machine makes the same graph."""


def reference_pipeline(**options: dict[str, Any]) -> Pipeline:
    """The usual passes with the reference's kernels; `options` by pass, `_` for `-`."""
    pipeline = Pipeline.named("aot")
    given = {**REFERENCE, **{name.replace("_", "-"): values for name, values in options.items()}}
    for name, values in given.items():
        pipeline = pipeline.with_options(name, **{**REFERENCE.get(name, {}), **values})
    return pipeline


def run_history(fuel: int | None = None, **options: dict[str, Any]) -> History:
    """The history of the small Llama's passes."""
    from captures import capture

    model, ids = small_llama()
    graph = capture(model, input_ids=ids, route="export")
    return reference_pipeline(**options).run(graph, PassContext(weights=WeightStore(), fuel=Fuel(fuel)))


@functools.cache
def llama_inspection() -> Inspection:
    """The inspection of the small Llama, shared by tests that only read it."""
    captured_llama("export")
    graph = InspectedGraph.of(run_history(), figures=H200)
    return Inspection("a small llama", "input_ids int64[2, 6]", (graph,), {"passes": 0.5}, ("a note",))
