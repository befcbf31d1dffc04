"""`torch.compile(model, backend="mixq")`: rewrites Dynamo's graph and hands it to Inductor."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from mixq_compile.errors import MixqError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import PassContext
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.compilation import LinearRecord, record
from mixq_compile.runtime.compiled_graph import CompiledGraph, copy_graph_module
from mixq_compile.runtime.instances import GraphInstances
from mixq_compile.runtime.linear_records import linear_records
from mixq_compile.runtime.observation import observe
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.plan import default_pipeline, pipeline_for
from mixq_compile.runtime.release import release
from mixq_compile.runtime.weight_store import STORE

log = logging.getLogger(__name__)


def mixq_backend(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one Dynamo graph; found by the name `mixq`, no import needed.

    `options` are the fields of MixqOptions. Raises OptionError for a wrong one, and whatever a pass
    raises unless `on_error` is `fallback`.
    """
    try:
        chosen = MixqOptions.from_user(mode, options)
    except MixqError as error:
        raise torch_compat.passed_on(error) from error.__cause__
    chosen.warn_of_missing_statistics(stacklevel=2)
    if torch_compat.freezing_is_on():
        warnings.warn(
            "torch._inductor.config.freezing bakes packed weights into the compiled code: turn it off.",
            stacklevel=2,
        )
    return GraphInstances(module, example_inputs, functools.partial(_compile_graph, chosen))


def _compile_graph(
    options: MixqOptions, graph: CapturedGraph, example_inputs: Sequence[Any]
) -> CompiledGraph:
    untouched = copy_graph_module(graph.module) if options.on_error == "fallback" else None
    parameters = _parameters(graph)
    default = default_pipeline(graph)
    try:
        history = pipeline_for(options, default).run(graph, PassContext(stats=options.stats, weights=STORE))
    except Exception as error:
        if untouched is None or any(STORE.is_released(tensor) for tensor in parameters):
            raise
        log.exception("a pass failed, and on_error is 'fallback': this graph is compiled unquantized")
        record(options, None, (), parameters, fallback=f"{type(error).__name__}: {error}")
        return CompiledGraph(graph.with_module(untouched), example_inputs, options)
    observe(graph, history, options.report)
    linears = linear_records(graph)
    record(options, history, linears, parameters)
    if default != "swapped":
        _warn_if_idle(linears)
    if options.lowering == "inductor" and any(tensor.device.type == "cuda" for tensor in parameters):
        _say_what_graphs_gain(options)
    compiled = CompiledGraph(graph, example_inputs, options)
    if options.release_weights:
        _release(compiled, linears)
    return compiled


def _release(compiled: CompiledGraph, linears: Sequence[LinearRecord]) -> None:
    """Frees the packed weights that the graph no longer reads; says which it kept, and why."""
    unread = {id(tensor) for tensor in compiled.dropped}
    weights = {
        id(weight): (weight, linear.fqn)
        for linear in linears
        if linear.weight is not None
        and (weight := linear.weight()) is not None
        and STORE.packed_bytes(weight)
    }
    packed = [weight for key, (weight, _) in weights.items() if key in unread]
    outcome = release(packed, [weight for key, (weight, _) in weights.items() if key not in unread])
    log.info(
        "release_weights: freed the 16-bit weights of %d of %d linears", len(outcome.freed), len(weights)
    )
    reasons: dict[str, list[str]] = {}
    for weight, reason in outcome.kept:
        reasons.setdefault(reason, []).append(weights[id(weight)][1])
    for reason, names in reasons.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            f"release_weights kept the 16-bit weights of {len(names)} of {len(weights)} linears: {reason} "
            f"({', '.join(names[:5])}{more}). They run quantized and take their memory as before.",
            stacklevel=3,
        )


@functools.cache
def _said_what_graphs_gain() -> None:
    log.info(
        "compiled without CUDA graphs: mode='reduce-overhead' takes the host's launches out of each call, "
        "most of its time in small batches. It copies inputs, and its outputs last until the next call. "
        "`mixq bench host` measures both."
    )


def _say_what_graphs_gain(options: MixqOptions) -> None:
    """Once in a process, since the default is torch's own: no graphs."""
    if not options.inductor_patches().get("triton.cudagraphs"):
        _said_what_graphs_gain()


def _parameters(graph: CapturedGraph) -> list[Tensor]:
    """The model's own tensors that a graph reads."""
    return [
        tensor
        for node in graph.graph.nodes
        if node.op == "placeholder" and (tensor := graph.tensor(node)) is not None
    ]


def _warn_if_idle(linears: Sequence[LinearRecord]) -> None:
    if not linears:
        warnings.warn(
            "mixq found no linear in a graph: there is nothing to quantize in it. A model that runs in "
            "several graphs may have such ones; print(mixq_compile.report(model)) lists what was found.",
            stacklevel=3,
        )
    elif all(linear.scheme is None for linear in linears):
        reasons = "; ".join(sorted({linear.skip or "" for linear in linears}))
        warnings.warn(
            f"mixq quantized none of the {len(linears)} linears of a graph: {reasons}. "
            "print(mixq_compile.report(model)) lists them; options={'force': True} quantizes them anyway.",
            stacklevel=3,
        )
