"""`mixq.capture` and `mixq.compile`: the ahead-of-time route over torch.export."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from mixq_compile.calibration.arguments import arguments_of
from mixq_compile.errors import MixqError, OptionError
from mixq_compile.inspection.layers import layers_of
from mixq_compile.inspection.shown_history import ShownHistory
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import History, PassContext
from mixq_compile.runtime.linear_records import is_product
from mixq_compile.runtime.observation import model_name
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.plan import default_pipeline, pipeline_for
from mixq_compile.runtime.weight_store import WeightStore

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def capture(
    model: nn.Module,
    example: Example,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Exports a model in evaluation mode, without gradients.

    Args:
        model: the model; the training flags of its modules are restored.
        example: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        dynamic_shapes: as `torch.export.export` takes it; dynamic sizes need examples of at least 2.

    A transformers causal model is best captured with `{"input_ids": …, "use_cache": False}`.
    """
    args, kwargs = arguments_of(model, example)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    finally:
        for module in training:
            module.training = True


def compile(
    program: ExportedProgram,
    pipeline: str | None = None,
    *,
    example: Example | None = None,
    **options: Any,
) -> tuple[ExportedProgram, ShownHistory]:
    """Rewrites an exported program with a pipeline; returns the new program and its history.

    Args:
        program: from `capture` or `torch.export.export`.
        pipeline: a pipeline's name or text. None: `aot`, or `swapped` for a model that `quantize` swapped.
        example: inputs to export the result with. None: those the program was captured with.
        options: fields of MixqOptions.

    The result holds codes in place of 16-bit weights, can be saved by `torch.export.save` and run or
    compiled through its `module()`. Loading it needs `import mixq_compile.ops` first.
    """
    if isinstance(program, nn.Module):
        raise OptionError(
            "mixq_compile.compile takes an exported program: mixq_compile.capture(model, example) makes one. "
            "To compile the model itself, use torch.compile(model, backend='mixq')."
        )
    chosen = MixqOptions.from_user(options={"release_weights": True, **options, "pipeline": pipeline})
    chosen.warn_of_missing_statistics(stacklevel=2)
    args, kwargs = _arguments(example) if example is not None else (program.example_inputs or ((), {}))
    if not args and not kwargs:
        raise MixqError("the program has no example inputs to export the result with: pass example=.")
    graph = CapturedGraph.from_export(program)
    model = model_name(graph)
    context = PassContext(stats=chosen.stats, weights=WeightStore())
    default = default_pipeline(graph, ordinary="aot")
    # What is made in inference mode cannot be written outside of it, and calls write the outlier states.
    with torch.inference_mode(False):
        history = pipeline_for(chosen, default).run(graph, context)
    if default != "swapped":
        _warn_if_idle(graph, history)
    with torch.no_grad():
        rewritten = torch.export.export(
            graph.module, args, kwargs, dynamic_shapes=dynamic_shapes_of(program, args, kwargs), strict=False
        )
    return rewritten, ShownHistory.of(history, model)


def _warn_if_idle(graph: CapturedGraph, history: History) -> None:
    if any(is_product(node) for node in graph.graph.nodes):
        return
    left = layers_of(history)
    reasons = "; ".join(sorted({layer.skip or "" for layer in left}))
    why = f"none of its {len(left)} linears: {reasons}" if left else "it holds no linear"
    warnings.warn(
        f"mixq quantized nothing in the exported program: {why}. The history that mixq_compile.compile "
        "returns says it by linear; force=True quantizes those that would not be faster.",
        stacklevel=3,
    )


def dynamic_shapes_of(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The dynamic sizes of a captured program, for exporting it again; None where all are fixed."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    # Inputs that are no tensors, such as use_cache=False, stand there as themselves.
    values = iter(
        [
            placeholders[name].meta.get("val") if isinstance(name, str) and name in placeholders else None
            for name in program.graph_signature.user_inputs
        ]
    )

    def sizes_of(leaf: Any) -> Any:
        value = next(values)
        if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
            return None
        return {place: Dim.DYNAMIC for place, size in enumerate(value.shape) if not isinstance(size, int)}

    if not program.range_constraints:
        return None
    positional, named = tree_map(sizes_of, (args, kwargs))
    return (*positional, *named.values())
