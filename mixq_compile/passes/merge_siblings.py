"""`merge-siblings`: linears that read one value get one weight, and one product gives all results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.effects import is_in_place, is_region, is_written_between
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.shapes import hint_of
from mixq_compile.ops import providers
from mixq_compile.ops.joint_rows import join_rows, joinable, row_order
from mixq_compile.ops.weight_codes import weight_bits
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq

ROWS_OF_ARGUMENTS = {
    mixq.mixed_linear.default: {"weight_codes": 5, "weight_scale": 6, "outlier_weight": 7, "bias": 8},
    mixq.weight_only_linear.default: {"weight_codes": 1, "weight_scale": 2, "bias": 3},
}
"""Where a product takes what has a row for each of its outputs."""
LISTS = slice(3, 8)
"""The arguments of refresh_outlier_weights that hold items for each linear."""


@dataclass(frozen=True)
class Product:
    """A product of the graph, with its arguments by name."""

    node: Node

    def argument(self, name: str) -> Any:
        """The node of an argument with rows; None where the product has none."""
        place = ROWS_OF_ARGUMENTS[self.node.target].get(name)  # type: ignore[index]
        return None if place is None else self.node.args[place]

    @property
    def shared(self) -> tuple[Any, ...]:
        """The operator and the arguments that siblings have in common."""
        places = ROWS_OF_ARGUMENTS[self.node.target].values()  # type: ignore[index]
        common = [argument for place, argument in enumerate(self.node.args) if place not in places]
        return (self.node.target, *common)


@dataclass(frozen=True)
class Family:
    """Products of the same weights: siblings, once for each value that all of them read."""

    rounds: tuple[tuple[Product, ...], ...]
    """A layer shared by depth reads a value several times. The weights stand in the same order in each."""

    @property
    def products(self) -> tuple[Product, ...]:
        """The products of the first value."""
        return self.rounds[0]

    def nodes(self, name: str) -> list[Node]:
        """The nodes of an argument, one for each weight; empty where the products lack it."""
        found = [product.argument(name) for product in self.products]
        return [node for node in found if node is not None]

    def tensors(self, graph: CapturedGraph, name: str) -> list[Tensor]:
        """The tensors of an argument that is a parameter or buffer."""
        return [tensor for node in self.nodes(name) if (tensor := graph.tensor(node)) is not None]

    def features(self, graph: CapturedGraph) -> list[int]:
        """How many outputs each product has."""
        return [int(graph.value(node).shape[0]) for node in self.nodes("weight_codes")]


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """Joins the weights of linears that read one value (q, k and v; gate and up), and their products."""

    name: ClassVar[str] = "merge-siblings"
    requires: ClassVar[frozenset[str]] = frozenset({"fused-linears"})

    when: Literal["auto", "always", "never"] = "auto"
    """Where the provider says that one product beats several; wherever it is possible; or not at all."""
    kernel: str = "auto"
    """The provider that is asked."""

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """One decision for each set of siblings, and one for each linear that its siblings do not fit."""
        groups: dict[tuple[Any, frozenset[Node]], list[tuple[Product, ...]]] = defaultdict(list)
        for products in _readers_of_values(graph).values():
            kinds: dict[tuple[Any, ...], list[Product]] = defaultdict(list)
            for product in products:
                kinds[(*product.shared, graph.value(product.argument("weight_codes")).dtype)].append(product)
            for members in kinds.values():
                if len(members) > 1:
                    weights = frozenset(product.argument("weight_codes") for product in members)
                    groups[members[0].node.target, weights].append(tuple(members))
                elif len(products) > 1:
                    other = "its siblings have another scheme, policy or columns"
                    yield Decision.skipped(members[0].node, other, fqn=_fqn(members[0]))
        for rounds in groups.values():
            family = Family(tuple(rounds))
            first, others = family.products[0], [_fqn(product) for product in family.products[1:]]
            reason = self._why_not(graph, family)
            if reason is not None:
                yield Decision.skipped(first.node, reason, fqn=_fqn(first), details={"siblings": others})
                continue
            features = family.features(graph)
            what = f"one product with {', '.join(others)}: {' + '.join(map(str, features))} outputs"
            yield Decision.applied(first.node, what, fqn=_fqn(first), details={"features": features})
            _merge(graph, family)

    def _why_not(self, graph: CapturedGraph, family: Family) -> str | None:
        """Why siblings keep a product each."""
        if self.when == "never":
            return "merging is turned off"
        if self.when == "auto" and (reason := self._why_no_gain(graph, family)) is not None:
            return reason
        if any(len(products) != len(set(family.nodes("weight_codes"))) for products in family.rounds):
            return "one of the linears reads the value twice"
        return (
            _why_not_joined(graph, family)
            or _why_bias_is_in_the_way(graph, family)
            or _why_order_matters(graph, family)
        )

    def _why_no_gain(self, graph: CapturedGraph, family: Family) -> str | None:
        first = family.products[0].node
        operator = str(first.target).split(".")[1]
        x = graph.value(first.args[0])
        query = providers.KernelQuery(
            operator, x.device, x.dtype, weight_bits(graph.value(family.nodes("weight_codes")[0])),
            hint_of(x.shape[-1]), sum(family.features(graph)),
        )  # fmt: skip
        known = {entry.name for entry in providers.providers_of(operator)}
        chosen = providers.supporting(query, self.kernel if self.kernel in known else providers.AUTO)
        if chosen.merges is None:
            return f"one product is not known to beat several with {chosen.name}"
        verdict = chosen.merges(query)
        return None if verdict is True else f"no gain with {chosen.name}: {verdict}"


def _fqn(product: Product) -> str:
    return Annotations(product.node).fqn or ""


def _readers_of_values(graph: CapturedGraph) -> dict[Node, list[Product]]:
    """The products of the graph by the value that they read."""
    found: dict[Node, list[Product]] = defaultdict(list)
    for node in graph.walk(*ROWS_OF_ARGUMENTS):
        found[node.args[0]].append(Product(node))  # type: ignore[index]
    return found


def _refresh_of(products: Sequence[Product]) -> Node | None:
    """The refresh_outlier_weights node of products that share a quantization."""
    readers = {user: None for node in products[0].node.all_input_nodes for user in node.users}
    held = products[0].argument("outlier_weight")
    for user in readers:
        if user.target is mixq.refresh_outlier_weights.default and held in user.args[LISTS][1]:  # type: ignore[operator]
            return user
    return None


def _why_not_joined(graph: CapturedGraph, family: Family) -> str | None:
    """Why the weights of siblings cannot lie one below the other; None where they can."""
    own = {product.node for products in family.rounds for product in products}
    own |= {refresh for products in family.rounds if (refresh := _refresh_of(products)) is not None}
    names = ("weight_codes", "weight_scale", "outlier_weight")
    held = {name: family.tensors(graph, name) for name in names}
    if any(len(tensors) != len(family.nodes(name)) for name, tensors in held.items()):
        return "a packed weight is computed, not a buffer"
    identities = {id(tensor) for tensors in held.values() for tensor in tensors}
    for node in graph.graph.nodes:
        if id(graph.tensor(node)) in identities and not own.issuperset(node.users):
            # A graph must not read, of memory that it writes, both the whole and a part.
            return "one of the weights is also read without its siblings"
    order = row_order(held["weight_codes"])
    for tensors in held.values():
        if tensors and not joinable([tensors[place] for place in order]):
            return "one of the weights lies beside another linear's already, for another graph"
    return None


def _why_bias_is_in_the_way(graph: CapturedGraph, family: Family) -> str | None:
    place = {node: number for number, node in enumerate(graph.graph.nodes)}
    for products in family.rounds:
        biases = [bias for product in products if (bias := product.argument("bias")) is not None]
        if any(graph.tensor(bias) is None or place[bias] > place[products[0].node] for bias in biases):
            return "a bias is computed, not a parameter"
        if len({graph.value(bias).dtype for bias in biases}) > 1:
            return "the biases have several dtypes"
    return None


def _why_order_matters(graph: CapturedGraph, family: Family) -> str | None:
    """Why a product cannot come with its siblings', as a part of a larger result; None where it can."""
    total = sum(family.features(graph))
    for products in family.rounds:
        first, last = products[0].node, products[-1].node
        if is_written_between(first.args[0], first, last):  # type: ignore[arg-type]
            return "the value is changed in place between the products"
        for product in products:
            node, shape = product.node, graph.value(product.node).shape
            whole = graph.evaluate(aten.new_empty.default, (node, [*shape[:-1], total]), {})
            part = graph.evaluate(aten.slice.Tensor, (node, -1, 0, shape[-1]), {}, {node: whole})
            reason = _why_readers_refuse(graph, node, part)
            if reason is not None:
                return reason
    return None


def _strides(value: Any) -> list[Any]:
    """The strides of the tensors in a value, without those of sizes 1, which tell nothing."""
    if isinstance(value, (tuple, list)):
        return [_strides(item) for item in value]
    if not isinstance(value, Tensor):
        return []
    sizes = zip(value.stride(), value.shape, strict=True)
    return [hint_of(stride) for stride, size in sizes if hint_of(size) != 1]


def _why_readers_refuse(graph: CapturedGraph, node: Node, part: Tensor) -> str | None:
    """Why what reads a result could not read a part of a larger one, whose rows lie further apart."""
    if _strides(part) == _strides(graph.value(node)):
        return None
    others: dict[Node, Any] = {node: part}
    reader = node
    while (reader := reader.next).op != "root":
        if not any(source in others for source in reader.all_input_nodes):
            continue
        if reader.op == "output":
            return "a result leaves the graph, and may be expected to be adjacent in memory"
        if is_in_place(reader) or is_region(reader):
            return f"a result is read by {reader.name}, which may expect it to be adjacent in memory"
        try:
            computed = graph.evaluate(reader.target, reader.args, reader.kwargs, others)
        except Exception as error:
            return f"a result must be adjacent in memory for {reader.name} ({type(error).__name__})"
        if _strides(computed) != _strides(graph.value(reader)):
            others[reader] = computed
    return None


def _merge(graph: CapturedGraph, family: Family) -> None:
    """Joins what has rows, and every round's products."""
    order = row_order(family.tensors(graph, "weight_codes"))
    names = ("weight_codes", "weight_scale", "outlier_weight")
    joint: dict[str, Any] = {name: _joint(graph, family, name, order) for name in names if family.nodes(name)}
    if _biases_lie_together(graph, family, order):
        joint["bias"] = _joint(graph, family, "bias", order)
    weights = [family.nodes("weight_codes")[place] for place in order]
    for products in family.rounds:
        by_weight = {product.argument("weight_codes"): product for product in products}
        _merge_round(graph, products[0].node, [by_weight[weight] for weight in weights], dict(joint))


def _joint(graph: CapturedGraph, family: Family, name: str, order: list[int]) -> Node:
    tensors, nodes = family.tensors(graph, name), family.nodes(name)
    first = nodes[order[0]]
    return graph.attach(f"{graph.parameter_name(first)}.joint", join_rows([tensors[at] for at in order]))


def _biases_lie_together(graph: CapturedGraph, family: Family, order: list[int]) -> bool:
    """True where all have a bias that is a swapped module's own: an ordinary model's stay untouched."""
    biases = family.tensors(graph, "bias")
    if len(biases) < len(order) or any(Annotations(product.node).readers for product in family.products):
        return False
    return joinable([biases[place] for place in order])


def _merge_round(
    graph: CapturedGraph, first: Node, products: Sequence[Product], joint: dict[str, Any]
) -> None:
    """One product in place of those of one value, which become parts of its result."""
    refresh = _refresh_of(products) if "outlier_weight" in joint else None
    if refresh is not None:
        _refresh_jointly(graph, refresh, products, joint)
    views = [Annotations(product.node) for product in products]
    with graph.graph.inserting_before(first):
        if "bias" not in joint:
            joint["bias"] = _joint_bias(graph, first, products)
        arguments = list(first.args)
        for name, place in ROWS_OF_ARGUMENTS[first.target].items():  # type: ignore[index]
            arguments[place] = joint[name]
        merged = graph.call(first.target, arguments, like=first)  # type: ignore[arg-type]
        view = Annotations(merged)
        view.members = [member.to_json() for member in views]
        view.fqn, view.readers = _joint_name([member.fqn or "" for member in views]), None
        parts, start = [], 0
        for product in products:
            end = start + int(graph.value(product.argument("weight_codes")).shape[0])
            parts.append(graph.call(aten.slice.Tensor, (merged, -1, start, end), like=product.node))
            start = end
    for product, part in zip(products, parts, strict=True):
        graph.replace(product.node, part)


def _joint_name(names: Sequence[str]) -> str:
    """The names of siblings in one: `attn.q_proj+k_proj`, or in full where they have several parents."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1:
        return "+".join(names)
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _joint_bias(graph: CapturedGraph, first: Node, products: Sequence[Product]) -> Node | None:
    """The biases of ordinary parameters one behind the other, zeros for those that lack one."""
    biases = [product.argument("bias") for product in products]
    given = next((graph.tensor(bias) for bias in biases if bias is not None), None)
    if given is None:
        return None
    for place, product in enumerate(products):
        if biases[place] is None:
            codes = product.argument("weight_codes")
            zeros = given.new_zeros(graph.value(codes).shape[0])
            biases[place] = graph.attach(f"{graph.parameter_name(codes)}.no_bias", zeros)
    return graph.call(aten.cat.default, (biases,), like=first)


def _refresh_jointly(
    graph: CapturedGraph, refresh: Node, products: Sequence[Product], joint: dict[str, Any]
) -> None:
    """Lets a refresh fill the joint outlier weight; each linear keeps its own list of columns."""
    arguments: tuple[Any, ...] = refresh.args
    lists = arguments[LISTS]
    places = [lists[2].index(product.argument("weight_codes")) for product in products]
    places += [place for place in range(len(lists[2])) if place not in places]
    cached, codes, scale, original = ([lists[at][place] for place in places] for at in (0, 2, 3, 4))
    own = [product.argument("outlier_weight") for product in products]
    held = [joint["outlier_weight"], *(node for node in lists[1] if node not in own)]
    start = 0
    with graph.graph.inserting_before(refresh):
        for place in range(len(products)):
            end = start + int(graph.value(codes[place]).shape[0])
            for items, name in ((codes, "weight_codes"), (scale, "weight_scale")):
                items[place] = graph.call(aten.slice.Tensor, (joint[name], 0, start, end), like=refresh)
            start = end
    before, after = arguments[: LISTS.start], arguments[LISTS.stop :]
    refresh.args = (*before, cached, held, codes, scale, original, *after)
