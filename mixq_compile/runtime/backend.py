"""`torch.compile(model, backend="mixq")`: rewrites Dynamo's graph and hands it to Inductor."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from mixq_compile.errors import MixqError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import History, PassContext
from mixq_compile.runtime import memory, torch_compat
from mixq_compile.runtime.compilation import record
from mixq_compile.runtime.linear_records import linear_records
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.plan import pipeline_for
from mixq_compile.runtime.release import release
from mixq_compile.runtime.weight_store import STORE, PackedWeight

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
    chosen = MixqOptions.from_user(mode, options)
    if torch_compat.freezing_is_on():
        warnings.warn(
            "torch._inductor.config.freezing bakes packed weights into the compiled code: turn it off.",
            stacklevel=2,
        )
    graph = CapturedGraph.from_dynamo(module, example_inputs)
    parameters = {
        node: tensor
        for node in graph.graph.nodes
        if node.op == "placeholder" and (tensor := graph.tensor(node)) is not None
    }
    try:
        history = rewrite(graph, chosen)
    except Exception as error:
        if chosen.on_error != "fallback":
            raise
        log.exception("a pass failed, and on_error is 'fallback': this graph is compiled unquantized")
        record(chosen, None, (), parameters.values(), fallback=f"{type(error).__name__}: {error}")
        return CompiledGraph(CapturedGraph.from_dynamo(module, example_inputs), example_inputs, chosen)
    linears = linear_records(graph)
    compilation = record(chosen, history, linears, parameters.values())
    _warn_if_idle(
        compilation.number, [linear.skip for linear in linears if linear.scheme is None], len(linears)
    )
    compiled = CompiledGraph(graph, example_inputs, chosen)
    if chosen.release_weights:
        packed = [tensor for node, tensor in parameters.items() if STORE.packed(tensor)]
        unused = compiled.dropped
        freed = release(tensor for tensor in packed if id(tensor) in unused)
        log.info("release_weights: freed the 16-bit weights of %d of %d linears", len(freed), len(packed))
    return compiled


def rewrite(graph: CapturedGraph, options: MixqOptions) -> History:
    """Runs the pipeline for these options on the graph, in place."""
    swapped = any(node.target is torch.ops.mixq.linear.default for node in graph.graph.nodes)
    pipeline = pipeline_for(options, "swapped" if swapped else "jit")
    if not swapped:
        weights = [
            tensor
            for node in graph.graph.nodes
            if (tensor := graph.tensor(node)) is not None and tensor.dim() == 2
        ]
        memory.check(weights, options)
    context = PassContext(stats=options.stats, weights=STORE)
    return pipeline.run(graph, context)


def _warn_if_idle(number: int, skips: list[str | None], linears: int) -> None:
    if linears and len(skips) == linears:
        reasons = "; ".join(sorted({reason or "" for reason in skips}))
        warnings.warn(
            f"mixq quantized none of the {linears} linears of graph {number}: {reasons}. "
            "print(mixq_compile.report(model)) lists them; options={'force': True} quantizes them all the same.",
            stacklevel=3,
        )


def _without_unread_parameters(graph: CapturedGraph, owned: Iterable[Node]) -> GraphModule:
    """A copy of the graph module whose inputs are only those that something reads.

    Dynamo reads the placeholders of its own graph to know what to pass, so that one keeps them all.
    """
    kept = Graph()
    copies: dict[Node, Node] = {}
    kept.graph_copy(graph.graph, copies)
    kept.output(map_arg(graph.graph.output_node().args[0], copies.__getitem__))
    for node in owned:
        if not node.users:
            kept.erase_node(copies.pop(node))
    for node, copy in copies.items():
        torch_compat.copy_node_source(node, copy)
    module = GraphModule(graph.module, kept)
    module.meta = graph.module.meta
    torch_compat.copy_attribute_sources(graph.module, module)
    return module


@functools.cache
def _say_that_gradients_are_off() -> None:
    """Once a process, not once a graph."""
    warnings.warn(
        "the model has trainable weights and gradients are on: mixq runs it without them. "
        "torch.no_grad() or model.requires_grad_(False) silences this.",
        stacklevel=3,
    )


class CompiledGraph:
    """What Dynamo calls: checks the inputs, packs weights again where they were written, runs."""

    def __init__(self, graph: CapturedGraph, example_inputs: Sequence[Any], options: MixqOptions) -> None:
        """Compiles the graph; parameters that nothing reads any more are dropped from its inputs."""
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        owned = {node: tensor for node in placeholders if (tensor := graph.tensor(node)) is not None}
        self._kept: list[int] = []
        self._packed: list[tuple[int, list[PackedWeight]]] = []
        self._activations: list[tuple[int, str]] = []
        self.dropped: set[int] = set()
        """ids of the parameters that the compiled graph does not read."""
        for position, node in enumerate(placeholders):
            tensor = owned.get(node)
            if tensor is None and isinstance(example_inputs[position], Tensor):
                self._activations.append((position, node.name))
            if tensor is not None and (packs := STORE.packed(tensor)):
                self._packed.append((position, packs))
            if tensor is not None and not node.users:
                self.dropped.add(id(tensor))
            else:
                self._kept.append(position)
        module = _without_unread_parameters(graph, owned)
        torch_compat.register_attribute_sources(module, list(graph.attached))
        self._check_gradients(example_inputs, trainable=())
        self._trainable = [position for position, node in enumerate(placeholders) if node in owned]
        with torch.no_grad():
            self._run = self._lower(module, [example_inputs[place] for place in self._kept], options)

    def _lower(
        self, module: GraphModule, example_inputs: list[Any], options: MixqOptions
    ) -> Callable[..., Any]:
        if options.lowering == "eager":
            return module
        if options.lowering == "aot_eager":
            return torch_compat.aot_eager(module, example_inputs)
        return torch_compat.inductor(module, example_inputs, options.inductor_patches())

    def _check_gradients(self, arguments: Sequence[Any], trainable: Sequence[int]) -> None:
        if not torch.is_grad_enabled():
            return
        for position, name in self._activations:
            if arguments[position].requires_grad:
                raise MixqError(
                    f"input {name} requires grad, and a quantized graph has no gradient. Run it under "
                    "torch.no_grad() or torch.inference_mode(), or detach the input."
                )
        if any(arguments[place].requires_grad for place in trainable):
            _say_that_gradients_are_off()

    def __call__(self, *arguments: Any) -> Any:
        """Runs the graph on Dynamo's arguments, parameters included."""
        self._check_gradients(arguments, self._trainable)
        for position, packs in self._packed:
            weight = arguments[position]
            now = torch_compat.fingerprint(weight)
            if any(packed.packed_from != now and not packed.released for packed in packs):
                STORE.refresh(weight)
        with torch.no_grad():
            return self._run(*[arguments[place] for place in self._kept])
