"""Running passes on captured graphs, and calling the result: shared by the tests of passes and runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.snapshot import target_name
from mixq_compile.ir.verify import verify
from mixq_compile.pipeline import Decision, History, PassContext, Pipeline
from mixq_compile.runtime.weight_store import WeightStore

GOLDEN = Path(__file__).parent / "golden"

NAMED = "strip-guards,canonicalize-linear"
CHOSEN = f"{NAMED},select-scheme{{force=true}}"
BY_MAGNITUDE = f"{NAMED},select-scheme{{force=true threshold=6}}"
MIXED = f"{CHOSEN},rewrite-mixed-linear{{kernel=ref}}"
SHARED = f"{MIXED},share-quantize"
FUSED = f"{SHARED},fuse-epilogue"
WHOLE = f"{FUSED},select-kernels{{kernel=ref}},prune-dead-weights,verify"
"""The passes of `jit`, each list one or two longer than the one before, all with the reference's kernels."""


def run(
    graph: CapturedGraph, text: str, *, stats: Any = None, weights: WeightStore | None = None, **options: Any
) -> History:
    """Runs a pipeline with full verification behind each pass."""
    context = PassContext(stats=stats, weights=weights or WeightStore(), **options)
    return Pipeline.parse(text).run(graph, context, verify="full")


def decisions(history: History, name: str) -> list[Decision]:
    """The decisions of one pass."""
    (record,) = (record for record in history.records if record.spec.split("{")[0] == name)
    return list(record.decisions)


def reasons(history: History, name: str) -> dict[str, str]:
    """By layer: what one pass decided, as `verdict: reason`."""
    return {decision.fqn: f"{decision.verdict}: {decision.reason}" for decision in decisions(history, name)}


def calls(graph: CapturedGraph) -> list[str]:
    """What the graph calls, in order, without getitem."""
    names = [target_name(node.target) for node in graph.graph.nodes if node.op.startswith("call")]
    return [name for name in names if name != "getitem"]


def mixq_calls(graph: CapturedGraph) -> list[str]:
    """The `mixq::` operators that the graph calls, in order."""
    return [name.split(".")[1] for name in calls(graph) if name.startswith("mixq.")]


def nodes_of(graph: CapturedGraph, operator: str) -> list[torch.fx.Node]:
    """The nodes that call one `mixq::` operator."""
    return list(graph.walk(getattr(torch.ops.mixq, operator).default))


def linear_names(graph: CapturedGraph) -> dict[str, str | None]:
    """Name and role of each canonical linear."""
    found = graph.walk(torch.ops.aten.linear.default)
    return {Annotations(node).fqn or "": Annotations(node).role for node in found}


def call(graph: CapturedGraph, *inputs: Tensor) -> Any:
    """The graph's result on these inputs, operator by operator; a symbolic size is the first one's rows."""
    assert verify(graph) == []
    graph.graph.lint()
    graph.module.recompile()
    given = iter(inputs)
    arguments = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            tensor = graph.tensor(node)
            is_size = isinstance(graph.value(node), torch.SymInt)
            arguments.append(inputs[0].shape[0] if is_size else tensor if tensor is not None else next(given))
    with torch.no_grad():
        result = graph.module(*arguments)
    return result[0] if isinstance(result, (tuple, list)) else result


def sqnr(reference: Tensor, result: Tensor) -> float:
    """Signal-to-quantization-noise ratio of a result, in dB."""
    reference, result = reference.detach(), result.detach()
    noise = (result.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise.clamp_min(1e-300)))


def assert_golden(name: str, text: str) -> None:
    """Compares a text with `tests/golden/<name>`; UPDATE_GOLDEN=1 writes it instead."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.is_file(), f"no {path.name}: run with UPDATE_GOLDEN=1 to write it"
    assert text == path.read_text(), f"{path.name} differs; if that is meant, run with UPDATE_GOLDEN=1"
