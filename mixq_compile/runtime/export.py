"""`mixq.capture` and `mixq.compile`: the ahead-of-time route over torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mixq_compile.errors import MixqError, OptionError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import History, PassContext
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.plan import pipeline_for
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
        model: the model; its training flag is restored.
        example: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        dynamic_shapes: as `torch.export.export` takes it; dynamic sizes need examples of at least 2.

    A transformers causal model is best captured with `{"input_ids": …, "use_cache": False}`.
    """
    args, kwargs = _arguments(example)
    parameters = inspect.signature(model.forward).parameters
    unknown = [name for name in kwargs if name not in parameters and "kwargs" not in parameters]
    if unknown:
        raise OptionError(
            f"the model's forward takes no argument {unknown[0]!r}: it has {', '.join(parameters)}."
        )
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    finally:
        model.train(training)


def compile(
    program: ExportedProgram, pipeline: str = "aot", *, example: Example | None = None, **options: Any
) -> tuple[ExportedProgram, History]:
    """Rewrites an exported program with a pipeline; returns the new program and its history.

    Args:
        program: from `capture` or `torch.export.export`.
        pipeline: a pipeline's name or text.
        example: inputs to export the result with. None: those the program was captured with.
        options: fields of MixqOptions.

    The result holds codes in place of 16-bit weights, can be saved by `torch.export.save` and run or
    compiled through its `module()`. Loading it needs `import mixq_compile.ops` first.
    """
    chosen = MixqOptions.from_user(options={"pipeline": pipeline, "release_weights": True, **options})
    args, kwargs = _arguments(example) if example is not None else (program.example_inputs or ((), {}))
    if not args and not kwargs:
        raise MixqError("the program has no example inputs to export the result with: pass example=.")
    graph = CapturedGraph.from_export(program)
    context = PassContext(stats=chosen.stats, weights=WeightStore())
    history = pipeline_for(chosen, "aot").run(graph, context)
    graph.module.recompile()
    with torch.no_grad():
        rewritten = torch.export.export(
            graph.module, args, kwargs, dynamic_shapes=_dynamic_shapes(program), strict=False
        )
    return rewritten, history


def _dynamic_shapes(program: ExportedProgram) -> Any:
    """The dynamic shapes that a program was captured with, for exporting it again."""
    specification: Any = None
    args, kwargs = program.example_inputs or ((), {})
    ranges = program.range_constraints
    if ranges:
        names = list(program.graph_signature.user_inputs)
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        marked = []
        for name in names:
            value = placeholders[name].meta.get("val") if isinstance(name, str) else None
            if isinstance(value, Tensor):
                marked.append(
                    {
                        place: torch.export.Dim.DYNAMIC
                        for place, size in enumerate(value.shape)
                        if not isinstance(size, int)
                    }
                )
            else:
                marked.append(None)
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        del flat
        specification = torch.utils._pytree.tree_unflatten(marked, spec)
        args_spec, kwargs_spec = specification
        names_of_args = [name for name in names[: len(args_spec)]]
        specification = {**dict(zip(names_of_args, args_spec, strict=False)), **kwargs_spec}
    return specification
