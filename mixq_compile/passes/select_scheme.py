"""`select-scheme`: the scheme of each linear, or the reason why it stays in 16 or 32 bit."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.errors import OptionError, ReleasedWeightError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.heads import EMBEDDINGS
from mixq_compile.ir.name_patterns import names_explicitly, no_match, unmatched
from mixq_compile.ir.roles import OTHER
from mixq_compile.ir.shapes import row_count
from mixq_compile.ops import providers
from mixq_compile.ops.operands import operand
from mixq_compile.passes._obstacles import Obstacle
from mixq_compile.pipeline import Decision, Pass, PassContext
from mixq_compile.scheme import QuantScheme
from mixq_compile.selection.eligibility import FLOATS, ineligible
from mixq_compile.selection.gain import LARGE_BATCH, gains_by_merging, no_kernel, not_faster
from mixq_compile.selection.scheme_rules import SchemeRules
from mixq_compile.selection.statistics import never_ran


@dataclass(frozen=True)
class SelectScheme(Pass):
    """Annotates each linear with a scheme, or with why it is skipped."""

    name: ClassVar[str] = "select-scheme"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical-linears"})
    establishes: ClassVar[frozenset[str]] = frozenset({"schemes"})

    default: str = "w8a8o16"
    """Scheme of every linear that nothing else decides."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Runs of dotted name parts, globs, or `re:` expressions of linears to leave alone."""
    layers: tuple[str, ...] = ()
    """`pattern=scheme` for single linears; the first that fits decides, for a head that it names too."""
    threshold: float | str | None = None
    """Magnitude above which a column is kept in 16 bit, or a multiple of its row's mean such as 8x; none: the
    scheme's."""
    capacity: int | None = None
    """Most outlier columns of one linear; none: by its number of input channels."""
    miss: str | None = None
    """What a new outlier column does; none: the scheme's policy."""
    force: bool = False
    """Quantize every eligible linear, even where it is not faster."""
    kernel: str = "auto"
    """The provider whose speed and support decide."""
    merge_siblings: Literal["auto", "always", "never"] = "auto"
    """Judge linears that read one value as one product: where the provider gains by it; always; or never."""

    def scheme_for(self, fqn: str, role: str) -> QuantScheme:
        """The scheme of a linear of this name and role, with this pass's outlier options applied.

        Raises OptionError for an entry of `layers` that is not `pattern=scheme`.
        """
        return self._rules().scheme_for(fqn, role)

    def _rules(self) -> SchemeRules:
        pairs = []
        for entry in self.layers:
            pattern, equals, scheme = entry.rpartition("=")
            if not equals:
                raise OptionError(
                    f"layers takes pattern=scheme, for example '*.down_proj=w8a8', not {entry!r}."
                )
            pairs.append((pattern, scheme))
        return SchemeRules(self.default, tuple(pairs), self.threshold, self.capacity, self.miss)

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each linear."""
        embedded = _embeddings(graph)
        siblings = (
            self._siblings(graph, embedded) if self.merge_siblings != "never" and not self.force else {}
        )
        for node in graph.walk(torch.ops.aten.linear.default):
            view = Annotations(node)
            fqn = view.fqn or ""
            scheme = self.scheme_for(fqn, view.role or OTHER)
            weight = graph.tensor(graph.weight_parameter(operand(node, "weight")))
            released = (
                weight is not None and context.weights is not None and context.weights.is_released(weight)
            )
            obstacle = self._ineligible(graph, node, weight, embedded)
            reason = obstacle.reason if obstacle is not None else self._no_kernel(graph, node, scheme)
            reason = reason or never_ran(context.stats, fqn, scheme)
            if reason is None and not self.force and not released:
                reason = self._not_faster(graph, node, scheme, siblings.get(node, [node]))
            if reason is not None and released:
                raise ReleasedWeightError(
                    f"{fqn} would be left alone now ({reason}), but its weight was freed by "
                    "options={'release_weights': True}. Load the model again, or compile it as before."
                )
            if reason is not None:
                yield Decision.skipped(node, reason, fqn=fqn, details=obstacle.details if obstacle else None)
                view.skip = reason
                continue
            yield Decision.applied(node, f"scheme {scheme.name}", fqn=fqn)
            view.scheme, view.parameters = scheme.name, scheme.to_json()
        yield from self._unmatched(graph)

    def _unmatched(self, graph: CapturedGraph) -> Iterator[Decision]:
        """Warns of each pattern of the user's that means no linear, and notes it."""
        views = [Annotations(node) for node in graph.graph.nodes]
        held = [member["fqn"] for view in views for member in view.members or ()]
        fqns = list(dict.fromkeys([*(view.fqn for view in views if view.fqn), *held]))
        given = {
            "ignore": [pattern for pattern in self.ignore if pattern not in type(self).ignore],
            "layers": [entry.rpartition("=")[0] for entry in self.layers],
        }
        for option, patterns in given.items():
            for pattern in unmatched(patterns, fqns) if fqns else ():
                text = no_match(option, pattern, fqns, "this graph")
                warnings.warn(text, stacklevel=2)
                yield Decision(node="", fqn="", verdict="noted", reason=text)

    def _ineligible(
        self, graph: CapturedGraph, node: Node, weight: Tensor | None, embedded: Mapping[int, list[str]]
    ) -> Obstacle | None:
        """Why a linear stays as it is whatever it would gain; None where it need not."""
        view = Annotations(node)
        if view.skip is not None:
            return Obstacle(view.skip)
        if weight is None:
            return Obstacle("its weight is computed, not a parameter", (operand(node, "weight").name,))
        fqn = view.fqn or ""
        # Who names a linear and a scheme for it means it, whatever its name says.
        named = names_explicitly(fqn, [entry.rpartition("=")[0] for entry in self.layers])
        # That a head is tied says more than that it is one.
        role = OTHER if named or id(weight) in embedded else view.role or OTHER
        ignore = () if named else self.ignore
        reason = ineligible(fqn, role, weight, ignore)
        if reason is None and id(weight) in embedded:
            return Obstacle("its weight is tied to an embedding", tuple(embedded[id(weight)]))
        x = graph.value(operand(node, "input"))
        if reason is None and x.dtype not in FLOATS:
            reason = f"its input is {x.dtype}, not a floating-point type that has kernels"
        return Obstacle(reason) if reason is not None else None

    def _no_kernel(self, graph: CapturedGraph, node: Node, scheme: QuantScheme) -> str | None:
        out_features, in_features = graph.value(operand(node, "weight")).shape
        x = graph.value(operand(node, "input"))
        return no_kernel(x, out_features, in_features, scheme)

    def _siblings(self, graph: CapturedGraph, embedded: Mapping[int, list[str]]) -> dict[Node, list[Node]]:
        """For each eligible linear those, itself among them, that read its value with its scheme."""
        found: dict[tuple[Node, QuantScheme], list[Node]] = defaultdict(list)
        for node in graph.walk(torch.ops.aten.linear.default):
            view = Annotations(node)
            weight = graph.tensor(graph.weight_parameter(operand(node, "weight")))
            if self._ineligible(graph, node, weight, embedded) is None:
                scheme = self.scheme_for(view.fqn or "", view.role or OTHER)
                found[operand(node, "input"), scheme].append(node)
        return {node: nodes for nodes in found.values() for node in nodes}

    def _not_faster(
        self, graph: CapturedGraph, node: Node, scheme: QuantScheme, siblings: list[Node]
    ) -> str | None:
        x = graph.value(operand(node, "input"))
        fixed, traced = row_count(x)
        rows = [fixed] if fixed is not None else sorted({traced or LARGE_BATCH, LARGE_BATCH})

        def query_of(nodes: Sequence[Node]) -> providers.KernelQuery:
            out_features = sum(graph.value(operand(each, "weight")).shape[0] for each in nodes)
            in_features = graph.value(operand(node, "weight")).shape[1]
            return providers.linear_query(x, out_features, in_features, scheme.weight, scheme.activation)

        alone = query_of([node])
        merged = self.merge_siblings == "always" or gains_by_merging(alone, self.kernel)
        return not_faster(query_of(siblings) if merged else alone, rows, self.kernel)


def _embeddings(graph: CapturedGraph) -> dict[int, list[str]]:
    """Names of the nodes that look up rows of a parameter, by its id."""
    found: dict[int, list[str]] = defaultdict(list)
    for node in graph.walk(*EMBEDDINGS):
        for source in node.all_input_nodes:
            if (tensor := graph.tensor(source)) is not None:
                found[id(tensor)].append(node.name)
    return found
