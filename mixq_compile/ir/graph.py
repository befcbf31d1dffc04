"""The graph that passes read and rewrite, captured by Dynamo or by torch.export."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from mixq_compile.ir import names
from mixq_compile.ir.effects import has_effect
from mixq_compile.ir.evaluate import Evaluator, UnknownValueError
from mixq_compile.ir.linears import transposed_source
from mixq_compile.ops.operands import result_place, signature_of

Origin = Literal["dynamo", "export"]

INHERITED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")
"""What a node that a pass makes takes over from the node it stands for, beside its annotations."""

LINEAR_MODULES = ("Linear", "Conv1D")
"""How the class of a module ends that does nothing but one linear; Conv1D is GPT-2's."""


class CapturedGraph:
    """A `GraphModule` with what its capture knew: values, real tensors, names and Python lines.

    Passes rewrite `graph` in place; nothing is traced again.
    """

    module: GraphModule
    """The graph module; owns the tensors that passes attach."""
    origin: Origin
    """How the graph was captured."""
    attached: dict[str, Tensor]
    """Tensors that passes attached, by attribute name of `module`."""
    current: Node | None
    """The node that a pass is looking at, where it goes through the graph with `walk`."""

    def __init__(self, module: GraphModule, origin: Origin, inputs: Mapping[str, Any] | None = None) -> None:
        """Wraps a module; `inputs` are the real arguments by placeholder name.

        `from_dynamo` and `from_export` are the usual ways in.
        """
        self.module = module
        self.origin = origin
        self.attached = {}
        self.current = None
        self._fake_mode: FakeTensorMode | None = None
        self._attribute_of: dict[int, str] = {}
        self._name_of: dict[str, str] = {}
        self._reader_of: dict[str, Node] = {}
        self._end_of_inputs: Node | None = None
        self._evaluator: Evaluator | None = None
        self._computed: dict[Node, tuple[Any, ...]] = {}
        self._fakes: dict[tuple[Any, ...], Tensor] = {}
        dynamo, export = "example_value", "val"
        self._value_keys = (dynamo, export) if origin == "dynamo" else (export, dynamo)
        # Dynamo takes the sources out of the metadata again when the backend returns.
        self._sources: dict[str, str] = {
            node.name: source
            for node in module.graph.nodes
            if (source := names.source_text(node)) is not None and names.is_owned_tensor(source)
        }
        self._tensors = {name: inputs[name] for name in self._sources} if inputs else {}
        self._roots = {names.split_source(source)[0] for source in self._sources.values()}

    @classmethod
    def from_dynamo(cls, module: GraphModule, example_inputs: Sequence[Any]) -> CapturedGraph:
        """The graph that a `torch.compile` backend is given; parameters are among the inputs."""
        placeholders = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        return cls(module, "dynamo", dict(zip(placeholders, example_inputs, strict=True)))

    @classmethod
    def from_export(cls, program: ExportedProgram) -> CapturedGraph:
        """The graph of an exported program: a new module that shares the program's tensors."""
        return cls(program.module(), "export")

    def with_module(self, module: GraphModule) -> CapturedGraph:
        """The same capture over another copy of its graph module."""
        return CapturedGraph(module, self.origin, self._tensors)

    def inner(self, module: GraphModule, given: Mapping[str, Node]) -> CapturedGraph:
        """The capture of a graph that one of its calls runs; `given` are nodes by that one's placeholders."""
        made = CapturedGraph(module, self.origin)
        made._roots = self._roots
        for name, node in given.items():
            if (tensor := self.tensor(node)) is not None:
                made._tensors[name] = tensor
                made._sources[name] = self._sources.get(node.name) or str(node.target)
        return made

    @property
    def graph(self) -> Graph:
        """The graph itself."""
        return self.module.graph

    def walk(self, *targets: Any) -> Iterator[Node]:
        """The nodes in order, those that call one of `targets` if any are given.

        Safe while the graph is rewritten: new nodes are not visited, erased ones are passed over.
        """
        for node in list(self.graph.nodes):
            if not is_erased(node) and (not targets or node.target in targets):
                self.current = node
                yield node
        self.current = None

    # Values ------------------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        """The recorded value of a node: a fake tensor, a size, a tuple of them; None if unknown.

        A constant argument is its own value.
        """
        if not isinstance(node, Node):
            return node
        meta = node.meta
        first, second = self._value_keys
        return meta[first] if first in meta else meta.get(second)

    def has_value(self, node: Node) -> bool:
        """True where a value was recorded, be it None."""
        return "val" in node.meta or "example_value" in node.meta

    def set_value(self, node: Node, value: Any) -> None:
        """Records the value of a node where the graph's consumer looks for it."""
        node.meta[self._value_keys[0]] = value

    def known_value(self, node: Node) -> Any:
        """The recorded value of a node. Raises UnknownValueError where none was recorded."""
        if not self.has_value(node):
            raise UnknownValueError(f"the value of %{node.name} is not known")
        return self.value(node)

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that the recorded fake tensors belong to; a new one where there are none."""
        if self._fake_mode is None:
            for node in self.graph.nodes:
                for leaf in tree_leaves(self.value(node)):
                    if isinstance(leaf, FakeTensor):
                        self._fake_mode = leaf.fake_mode
                        return self._fake_mode
            # Here, since sympy behind it takes half a second, which listing passes need not wait for.
            from torch.fx.experimental.symbolic_shapes import ShapeEnv

            self._fake_mode = FakeTensorMode(shape_env=ShapeEnv())
        return self._fake_mode

    def evaluate(
        self,
        target: Callable[..., Any] | str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        instead: Mapping[Node, Any] | None = None,
    ) -> Any:
        """What a call gives for the recorded values of its arguments; adds no guard on their sizes.

        `instead` are values of nodes in place of the recorded ones. Raises UnknownValueError where one
        is not recorded, and what the operator raises.
        """
        if self._evaluator is None:
            self._evaluator = Evaluator(self.fake_mode)
        others = instead or {}

        def value_of(node: Node) -> Any:
            return others[node] if node in others else self.known_value(node)

        return self._evaluator(target, args, kwargs, value_of)

    def tensor(self, node: Any) -> Tensor | None:
        """The real parameter or buffer that a node stands for; None for an activation or an input."""
        if not isinstance(node, Node):
            return None
        if node.op == "get_attr":
            found = self.attribute(str(node.target))
            return found if isinstance(found, Tensor) else None
        return self._tensors.get(node.name) if node.op == "placeholder" else None

    def attribute(self, target: str) -> Any:
        """What a dotted attribute name of the module names; None where nothing does."""
        found: Any = self.module
        for part in target.split("."):
            found = getattr(found, part, None)
        return found

    # Names -------------------------------------------------------------------------------------

    def _qualified(self, source: str) -> str:
        root, name = names.split_source(source)
        if len(self._roots) > 1 and root:
            return f"{root}.{name}" if name else root
        return name

    def fqn(self, node: Node) -> str:
        """The name of the module that a call belongs to, the same by both routes; empty if unknown.

        A call outside every module is named after the owner of its first parameter. Where one graph
        holds several models, names begin with the variable that holds each.
        """
        source = names.module_source(node)
        if source is not None:
            return self._qualified(source)
        for argument in node.all_input_nodes:
            parameter = self.parameter_name(argument)
            if parameter:
                return parameter.rpartition(".")[0]
        return ""

    def parameter_name(self, node: Node) -> str:
        """The name of the parameter or buffer that a node stands for; empty for anything else."""
        if node.op == "get_attr":
            attribute = str(node.target)
            return self._name_of.get(attribute) or names.normalise_fqn(attribute)
        source = self._sources.get(node.name) if node.op == "placeholder" else None
        return self._qualified(source) if source is not None else ""

    def owner_is_linear(self, node: Node) -> bool:
        """True where the module that a call belongs to is a linear: routers and functional uses are not."""
        kind = names.module_type(node)
        return kind is not None and kind.endswith(LINEAR_MODULES)

    def weight_parameter(self, node: Any) -> Node | None:
        """The parameter behind a weight or its transpose; None for a weight that is computed."""
        if not isinstance(node, Node):
            return None
        source = transposed_source(node)
        parameter = source if source is not None else node
        return parameter if self.tensor(parameter) is not None else None

    def location(self, node: Node) -> str:
        """The line of the model's Python code that a node comes from; empty if unknown."""
        return names.location(node)

    # Rewriting ---------------------------------------------------------------------------------

    def attach(self, name: str, tensor: Tensor, after: Node | None = None) -> Node:
        """A `get_attr` node for a tensor that becomes a buffer of the module.

        The same tensor gives the same node. The name is made valid and unique; new nodes stand
        behind `after`, or behind the inputs.
        """
        attribute = self._attribute_of.get(id(tensor))
        if attribute is None:
            attribute = self._unused_attribute(name)
            self.module.register_buffer(attribute, tensor)
            self.attached[attribute] = tensor
            self._attribute_of[id(tensor)] = attribute
            self._name_of[attribute] = name
        reader = self._reader_of.get(attribute)
        if reader is not None and not is_erased(reader):
            return reader
        with self.graph.inserting_after(after if after is not None else self._last_input()):
            node = self.graph.get_attr(attribute)
        if after is None:
            self._end_of_inputs = node
        self._reader_of[attribute] = node
        self.set_value(node, self._fake(tensor))
        return node

    def _fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same sizes; one for all alike, because making one takes long."""
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._fakes:
            shape, stride, dtype, device = key
            with self.fake_mode:
                self._fakes[key] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return self._fakes[key]

    def _unused_attribute(self, name: str) -> str:
        valid = re.sub(r"\W", "_", name)
        valid = valid if valid.isidentifier() else f"_{valid}"
        unique, number = valid, 0
        while hasattr(self.module, unique):
            number += 1
            unique = f"{valid}_{number}"
        return unique

    def _last_input(self) -> Node:
        """The last of the nodes that a graph begins with; its root where it begins with a call."""
        last = self._end_of_inputs
        if last is None or is_erased(last):
            last = self.graph._root
            for node in self.graph.nodes:
                if node.op not in ("placeholder", "get_attr"):
                    break
                last = node
        return last

    def call(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] | Mapping[str, Any],
        *,
        like: Node | None = None,
        custom: Mapping[str, Any] | None = None,
    ) -> Node:
        """A call at the graph's insertion point, with its value computed on the arguments' values.

        `args` stand in order, or are given by the names in the operator's schema. `like` is the node that
        the call stands for: its Python line, module and annotations are copied. `custom` replaces the
        copied `meta["custom"]`. Raises UnknownValueError where an argument has no recorded value, and what
        the operator raises on wrong arguments; the graph is then unchanged.
        """
        kwargs: dict[str, Any] = {}
        if isinstance(args, Mapping):
            args, kwargs = signature_of(target).arrange(args)
        value = self.evaluate(target, args, kwargs)
        node = self.graph.call_function(target, tuple(args), kwargs)
        if like is not None:
            node.meta.update({key: like.meta[key] for key in INHERITED_META if key in like.meta})
            if "custom" in like.meta:
                # No deeper: whoever writes an annotation replaces the dictionary that holds it.
                node.meta["custom"] = dict(like.meta["custom"])
        if custom is not None:
            node.meta["custom"] = dict(custom)
        self.set_value(node, value)
        self.note_computed(node)
        return node

    def note_computed(self, node: Node) -> None:
        """Remembers that the recorded value is what the operator gives for its present arguments."""
        self._computed[node] = self._operands(node)

    def is_computed(self, node: Node) -> bool:
        """True where the recorded value was computed from the node's present arguments and their values."""
        before = self._computed.get(node)
        return before is not None and all(
            old is new for old, new in zip(before, self._operands(node), strict=False)
        )

    def _operands(self, node: Node) -> tuple[Any, ...]:
        values = (self.value(source) for source in node.all_input_nodes)
        return node.target, node.args, node.kwargs, self.value(node), *values

    def getitem(self, node: Node, index: int) -> Node:
        """One result of a call that returns several."""
        return self.call(operator.getitem, (node, index), like=node)

    def result(self, node: Node, name: str) -> Node:
        """One result of a `mixq::` operator that returns several, by its name; a new node."""
        return self.getitem(node, result_place(node.target, name))

    def replace(self, old: Node, new: Node) -> None:
        """Lets every reader of a node read another one, and erases it."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def eliminate_dead_code(self) -> bool:
        """Erases calls that nothing reads, except those with an effect. True if any was erased."""
        return self.graph.eliminate_dead_code(has_effect)

    def is_dead(self, node: Node) -> bool:
        """True for a node that nothing reads and that has no effect of its own."""
        return not node.users and not has_effect(node)

    def unread_attributes(self) -> list[str]:
        """Names of the module's parameters and buffers that no node reads, or only one that nothing reads."""
        readers = [node for node in self.graph.nodes if node.op in ("get_attr", "call_module")]
        read = {str(node.target) for node in readers if not self.is_dead(node)}
        within = tuple(f"{name}." for name in read)
        owned = (*self.module.named_parameters(remove_duplicate=False),
                 *self.module.named_buffers(remove_duplicate=False))  # fmt: skip
        return [name for name, _ in owned if name not in read and not name.startswith(within)]

    def delete_attribute(self, target: str) -> None:
        """Deletes a parameter, buffer or submodule by its dotted name."""
        owner, _, name = target.rpartition(".")
        delattr(self.module.get_submodule(owner), name)
        tensor = self.attached.pop(target, None)
        self._attribute_of.pop(id(tensor), None)


def is_erased(node: Node) -> bool:
    """True for a node that has been erased from its graph."""
    return bool(getattr(node, "_erased", False))
