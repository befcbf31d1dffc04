"""A rewritten graph as Dynamo calls it: lowered once, its weights packed again where they were written."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from mixq_compile.errors import MixqError, ReleasedWeightError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.state_access import LEARNING, state_access
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.derived_weights import DerivedWeight
from mixq_compile.runtime.gradient_transforms import enable_gradients_inside_transforms
from mixq_compile.runtime.joined_calls import join_calls
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.stored_weight import StoredWeight
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.runtime.weight_watch import WeightWatch


def copy_graph_module(module: GraphModule, without: Collection[Node] = ()) -> GraphModule:
    """A copy of Dynamo's graph module with a graph of its own, without these unread placeholders.

    Dynamo reads the placeholders of its own graph to know what to pass, so that one keeps them all.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(module.graph, copies)
    graph.output(map_arg(module.graph.output_node().args[0], copies.__getitem__))
    for node in without:
        graph.erase_node(copies.pop(node))
    for node, copy in copies.items():
        torch_compat.copy_node_source(node, copy)
    copied = GraphModule(module, graph)
    copied.meta = module.meta
    torch_compat.copy_attribute_sources(module, copied)
    return copied


@functools.cache
def _say_that_gradients_are_off() -> None:
    """Once a process, not once a graph."""
    warnings.warn(
        "the model has trainable weights and gradients are on: mixq runs it without them. "
        "torch.no_grad() or model.requires_grad_(False) silences this.",
        stacklevel=4,
    )


class CompiledGraph:
    """What Dynamo calls: checks the inputs, packs weights again where they were written, runs."""

    def __init__(self, graph: CapturedGraph, example_inputs: Sequence[Any], options: MixqOptions) -> None:
        """Lowers the graph; parameters that nothing reads any more are dropped from its inputs."""
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        owned = [graph.tensor(node) for node in placeholders]
        unread = [
            node
            for node, tensor in zip(placeholders, owned, strict=True)
            if tensor is not None and not node.users
        ]
        self.dropped = tuple(tensor for node in unread if (tensor := graph.tensor(node)) is not None)
        """The parameters and buffers that the lowered graph does not read."""
        self._kept = [place for place, node in enumerate(placeholders) if node not in unread]
        self._packed: list[tuple[int, list[StoredWeight | DerivedWeight]]] = []
        watched: list[tuple[int, Tensor, StoredWeight | DerivedWeight]] = []
        self._trainable: list[int] = []
        self._activations: list[tuple[int, str]] = []
        for place, (node, tensor) in enumerate(zip(placeholders, owned, strict=True)):
            if tensor is not None:
                self._trainable.append(place)
                if codes := STORE.followers(tensor):
                    self._packed.append((place, codes))
                    if has_data(tensor) and not STORE.is_released(tensor):
                        watched.append((place, tensor, codes[-1]))
            elif isinstance(example_inputs[place], Tensor):
                self._activations.append((place, node.name))
        self._read = [
            (position, placeholders[place].name)
            for position, place in enumerate(self._kept)
            if owned[place] is not None
        ]
        self._check_released([owned[place] for place in self._kept])
        self.watch = WeightWatch(watched)
        """Looks for writes to the packed weights that torch does not count."""
        self._accesses = _accesses(graph)
        # A weak reference to a tensor may end while only C++ code holds it, as compiled code does.
        self._attached = tuple(graph.attached.values())
        module = copy_graph_module(graph.module, unread)
        join_calls(module)
        enable_gradients_inside_transforms(module)
        torch_compat.register_attribute_sources(module, list(graph.attached))
        with torch.no_grad():
            self._run = _lower(module, [example_inputs[place] for place in self._kept], options)

    def _check_gradients(self, arguments: Sequence[Any]) -> None:
        if not torch.is_grad_enabled():
            return
        for place, name in self._activations:
            if arguments[place].requires_grad:
                raise MixqError(
                    f"input {name} requires grad, and a quantized graph has no gradient. Run it under "
                    "torch.no_grad() or torch.inference_mode(), or detach the input."
                )
        if any(arguments[place].requires_grad for place in self._trainable):
            _say_that_gradients_are_off()

    def _check_released(self, arguments: Sequence[Any]) -> None:
        """Raises ReleasedWeightError where the graph would read a weight whose storage was freed."""
        self._releases = STORE.releases
        for position, name in self._read:
            if STORE.is_released(arguments[position]):
                raise ReleasedWeightError(
                    f"this graph reads {name}, which options={{'release_weights': True}} freed after another "
                    "graph of the model was compiled. Load the model again and leave that option out."
                )

    def access(self) -> AbstractContextManager[None]:
        """The context of a call: of every device on which it reads codes, states and caches."""
        return self._accesses[0] if len(self._accesses) == 1 else _all_of(self._accesses)

    def _pack_written(self, arguments: Sequence[Any]) -> None:
        """Packs weights again that were written since."""
        for place, packed in self._packed:
            now = torch_compat.fingerprint(arguments[place])
            for codes in packed:
                if codes.packed_from != now:
                    STORE.refresh(arguments[place])
                    break
        self.watch.look(arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Runs the graph on Dynamo's arguments, parameters included."""
        self._check_gradients(arguments)
        self._pack_written(arguments)
        kept = [arguments[place] for place in self._kept]
        if self._releases != STORE.releases:
            self._check_released(kept)
        begin = time.perf_counter()
        with self.access(), torch.no_grad():
            result = self._run(*kept)
        self.watch.ran(time.perf_counter() - begin)
        return result


def _accesses(graph: CapturedGraph) -> list[AbstractContextManager[None]]:
    """The contexts of a call: one for each device on which it reads codes, states and caches."""
    learns: dict[torch.device, bool] = {}
    for node in graph.graph.nodes:
        if getattr(node.target, "namespace", None) == "mixq":
            policy = Annotations(node).policy
            for source in node.all_input_nodes:
                tensor = graph.tensor(source)
                if tensor is not None:
                    learning = policy is not None and policy["miss"] in LEARNING
                    learns[tensor.device] = learns.get(tensor.device, False) or learning
    return [state_access(device, learns[device]) for device in sorted(learns, key=str)]


@contextmanager
def _all_of(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _lower(module: GraphModule, example_inputs: list[Any], options: MixqOptions) -> Callable[..., Any]:
    if options.lowering == "eager":
        return module
    if options.lowering == "aot_eager":
        return torch_compat.aot_eager(module, example_inputs)
    return torch_compat.inductor(module, example_inputs, options.inductor_patches())
