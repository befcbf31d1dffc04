"""`merge-siblings`: linears that read one value get one weight, and one product gives all results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.effects import is_in_place, is_region
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.shapes import hint_of
from mixq_compile.ops import providers
from mixq_compile.ops.joint_rows import join_rows, joinable, row_order
from mixq_compile.ops.operands import given_operands, listed_operands, operand, operands, set_operands
from mixq_compile.ops.state_access import exclusive_access
from mixq_compile.ops.traits import Traits, traits_of
from mixq_compile.passes._kernel_queries import kernel_query
from mixq_compile.passes._obstacles import UNLIKE, Obstacle, written_between
from mixq_compile.pipeline import Decision, Pass, PassContext

aten, mixq = torch.ops.aten, torch.ops.mixq

REFRESH = mixq.refresh_outlier_weights.default
PACKED = ("weight_codes", "weight_scale", "weight_zero", "outlier_weight")
"""The operands with rows that lie in the weight store; a bias is the model's own."""


@dataclass(frozen=True)
class Product:
    """A product of the graph that siblings can join."""

    node: Node
    traits: Traits

    @classmethod
    def of(cls, node: Node) -> Product | None:
        """The product that a node computes; None where it computes none that joins."""
        traits = traits_of(node.target)
        return cls(node, traits) if traits is not None and traits.joins else None

    @property
    def source(self) -> Node:
        """The value that is multiplied."""
        found: Node = operand(self.node, self.traits.source)
        return found

    def rows(self, name: str) -> Any:
        """An operand with rows; None where the product has none of that name."""
        return operand(self.node, name) if name in self.traits.rows else None

    @property
    def shared(self) -> tuple[Any, ...]:
        """The operator and the operands that siblings have in common."""
        own = (*self.traits.rows, *self.traits.columns)
        given = operands(self.node).items()
        return (self.node.target, *((name, value) for name, value in given if name not in own))

    @property
    def columns(self) -> list[Node]:
        """The operands with a column for each output that it is given."""
        found = [operand(self.node, name) for name in self.traits.columns]
        return [node for node in found if node is not None]


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
        """The nodes of an operand with rows, one for each weight; empty where the products lack it."""
        found = [product.rows(name) for product in self.products]
        return [node for node in found if node is not None]

    def tensors(self, graph: CapturedGraph, name: str) -> list[Tensor]:
        """The tensors of an operand that is a parameter or buffer."""
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
                kinds[(*product.shared, graph.value(product.rows("weight_codes")).dtype)].append(product)
            for members in kinds.values():
                if len(members) > 1:
                    weights = frozenset(product.rows("weight_codes") for product in members)
                    groups[members[0].node.target, weights].append(tuple(members))
                elif len(products) > 1:
                    others = [each.node for each in products if each is not members[0]]
                    found = Obstacle.of(f"it has siblings {UNLIKE}", others)
                    node, fqn = members[0].node, _fqn(members[0])
                    yield Decision.skipped(node, found.reason, fqn=fqn, details=found.details)
        for rounds in groups.values():
            family = Family(tuple(rounds))
            first, siblings = family.products[0], [_fqn(product) for product in family.products[1:]]
            obstacle = self._why_not(graph, family)
            if obstacle is not None:
                details = {"siblings": siblings, **obstacle.details}
                yield Decision.skipped(first.node, obstacle.reason, fqn=_fqn(first), details=details)
                continue
            features = family.features(graph)
            what = f"one product with {', '.join(siblings)}: {' + '.join(map(str, features))} outputs"
            yield Decision.applied(first.node, what, fqn=_fqn(first), details={"features": features})
            _merge(graph, family)

    def _why_not(self, graph: CapturedGraph, family: Family) -> Obstacle | None:
        """Why siblings keep a product each."""
        if self.when == "never":
            return Obstacle("merging is turned off")
        if added := [node for products in family.rounds for product in products for node in product.columns]:
            return Obstacle.of("a product adds what has a column for each of its outputs", added)
        if self.when == "auto" and (reason := self._why_no_gain(graph, family)) is not None:
            return Obstacle(reason)
        for products in family.rounds:
            weights = [product.rows("weight_codes") for product in products]
            again = [product for place, product in enumerate(products) if weights[place] in weights[:place]]
            if again:
                return Obstacle.of(
                    "one of the linears reads the value twice", [product.node for product in again]
                )
        return (
            _why_not_joined(graph, family)
            or _why_bias_is_in_the_way(graph, family)
            or _why_order_matters(graph, family)
        )

    def _why_no_gain(self, graph: CapturedGraph, family: Family) -> str | None:
        first = family.products[0].node
        x = graph.value(family.products[0].source)
        query = replace(
            kernel_query(graph, first),
            in_features=hint_of(x.shape[-1]),
            out_features=sum(family.features(graph)),
        )
        known = {entry.name for entry in providers.providers_of(query.op)}
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
    for node in graph.walk():
        if (product := Product.of(node)) is not None:
            found[product.source].append(product)
    return found


def _refresh_of(products: Sequence[Product]) -> Node | None:
    """The refresh_outlier_weights node of products that share a quantization."""
    readers = {user: None for node in products[0].node.all_input_nodes for user in node.users}
    held = products[0].rows("outlier_weight")
    for user in readers:
        if user.target is REFRESH and held in operand(user, "outlier_weight"):
            return user
    return None


def _why_not_joined(graph: CapturedGraph, family: Family) -> Obstacle | None:
    """Why the weights of siblings cannot lie one below the other; None where they can."""
    own = {product.node for products in family.rounds for product in products}
    own |= {refresh for products in family.rounds if (refresh := _refresh_of(products)) is not None}
    held = {name: family.tensors(graph, name) for name in PACKED}
    packed = [node for name in PACKED for node in family.nodes(name)]
    if computed := [node for node in packed if graph.tensor(node) is None]:
        return Obstacle.of("a packed weight is computed, not a buffer", computed)
    identities = {id(tensor) for tensors in held.values() for tensor in tensors}
    for node in graph.graph.nodes:
        if id(graph.tensor(node)) in identities and not own.issuperset(node.users):
            # A graph must not read, of memory that it writes, both the whole and a part.
            others = [user for user in node.users if user not in own and user.target is not REFRESH]
            return Obstacle.of("one of the weights is also read without its siblings", others)
    order = row_order(held["weight_codes"])
    for tensors in held.values():
        if tensors and not joinable([tensors[place] for place in order]):
            return Obstacle("one of the weights lies beside another linear's already, for another graph")
    return None


def _why_bias_is_in_the_way(graph: CapturedGraph, family: Family) -> Obstacle | None:
    place = {node: number for number, node in enumerate(graph.graph.nodes)}
    for products in family.rounds:
        biases = [bias for product in products if (bias := product.rows("bias")) is not None]
        first = place[products[0].node]
        if computed := [bias for bias in biases if graph.tensor(bias) is None or place[bias] > first]:
            return Obstacle.of("a bias is computed, not a parameter", computed)
        if len({graph.value(bias).dtype for bias in biases}) > 1:
            return Obstacle.of("the biases have several dtypes", biases)
    return None


def _why_order_matters(graph: CapturedGraph, family: Family) -> Obstacle | None:
    """Why a product cannot come with its siblings', as a part of a larger result; None where it can."""
    total = sum(family.features(graph))
    for products in family.rounds:
        first, last = products[0].node, products[-1].node
        obstacle = written_between(products[0].source, first, last, "the products")
        if obstacle is not None:
            return obstacle
        for product in products:
            node, shape = product.node, graph.value(product.node).shape
            whole = graph.evaluate(aten.new_empty.default, (node, [*shape[:-1], total]), {})
            part = graph.evaluate(aten.slice.Tensor, (node, -1, 0, shape[-1]), {}, {node: whole})
            obstacle = _why_readers_refuse(graph, node, part)
            if obstacle is not None:
                return obstacle
    return None


def _strides(value: Any) -> list[Any]:
    """The strides of the tensors in a value, without those of sizes 1, which tell nothing."""
    if isinstance(value, (tuple, list)):
        return [_strides(item) for item in value]
    if not isinstance(value, Tensor):
        return []
    sizes = zip(value.stride(), value.shape, strict=True)
    return [hint_of(stride) for stride, size in sizes if hint_of(size) != 1]


def _why_readers_refuse(graph: CapturedGraph, node: Node, part: Tensor) -> Obstacle | None:
    """Why what reads a result could not read a part of a larger one, whose rows lie further apart."""
    if _strides(part) == _strides(graph.value(node)):
        return None
    others: dict[Node, Any] = {node: part}
    reader = node
    while (reader := reader.next).op != "root":
        if not any(source in others for source in reader.all_input_nodes):
            continue
        if reader.op == "output":
            what = "a result leaves the graph, and may be expected to be adjacent in memory"
            return Obstacle.of(what, [source for source in reader.all_input_nodes if source in others])
        if is_in_place(reader) or is_region(reader):
            return Obstacle(
                f"a result is read by {reader.name}, which may expect it to be adjacent in memory",
                (reader.name,),
            )
        try:
            computed = graph.evaluate(reader.target, reader.args, reader.kwargs, others)
        except Exception as error:
            return Obstacle(
                f"a result must be adjacent in memory for {reader.name} ({type(error).__name__})",
                (reader.name,),
            )
        if _strides(computed) != _strides(graph.value(reader)):
            others[reader] = computed
    return None


def _merge(graph: CapturedGraph, family: Family) -> None:
    """Joins what has rows, and every round's products."""
    order = row_order(family.tensors(graph, "weight_codes"))
    joint: dict[str, Any] = {
        name: _joint(graph, family, name, order) for name in PACKED if family.nodes(name)
    }
    if _biases_lie_together(graph, family, order):
        joint["bias"] = _joint(graph, family, "bias", order)
    weights = [family.nodes("weight_codes")[place] for place in order]
    for products in family.rounds:
        by_weight = {product.rows("weight_codes"): product for product in products}
        _merge_round(graph, products[0].node, [by_weight[weight] for weight in weights], dict(joint))


def _joined(parts: list[Tensor]) -> Tensor:
    """`join_rows`, which moves the parts: while no call of another thread reads them."""
    with exclusive_access(parts[0].device):
        return join_rows(parts)


def _joint(graph: CapturedGraph, family: Family, name: str, order: list[int]) -> Node:
    tensors, nodes = family.tensors(graph, name), family.nodes(name)
    first = nodes[order[0]]
    return graph.attach(f"{graph.parameter_name(first)}.joint", _joined([tensors[at] for at in order]))


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
        rows = {name: joint[name] for name in products[0].traits.rows if name in joint}
        merged = graph.call(first.target, {**given_operands(first), **rows}, like=first)  # type: ignore[arg-type]
        view = Annotations(merged)
        view.members = [member.to_json() for member in views]
        view.fqn, view.readers = _joint_name([member.fqn or "" for member in views]), None
        parts, start = [], 0
        for product in products:
            end = start + int(graph.value(product.rows("weight_codes")).shape[0])
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
    biases = [product.rows("bias") for product in products]
    given = next((graph.tensor(bias) for bias in biases if bias is not None), None)
    if given is None:
        return None
    for place, product in enumerate(products):
        if biases[place] is None:
            codes = product.rows("weight_codes")
            zeros = given.new_zeros(graph.value(codes).shape[0])
            biases[place] = graph.attach(f"{graph.parameter_name(codes)}.no_bias", zeros)
    return graph.call(aten.cat.default, (biases,), like=first)


def _refresh_jointly(
    graph: CapturedGraph, refresh: Node, products: Sequence[Product], joint: dict[str, Any]
) -> None:
    """Lets a refresh fill the joint outlier weight; each linear keeps its own list of columns."""
    given = listed_operands(refresh)
    weights = given["weight_codes"]
    places = [weights.index(product.rows("weight_codes")) for product in products]
    places += [place for place in range(len(weights)) if place not in places]
    own = [product.rows("outlier_weight") for product in products]
    held = given.pop("outlier_weight")  # may have fewer items than the others: some stand for several linears
    lists = {name: [items[place] for place in places] for name, items in given.items()}
    start = 0
    with graph.graph.inserting_before(refresh):
        for place in range(len(products)):
            end = start + int(graph.value(lists["weight_codes"][place]).shape[0])
            for name in ("weight_codes", "weight_scale"):
                part = graph.call(aten.slice.Tensor, (joint[name], 0, start, end), like=refresh)
                lists[name][place] = part
            start = end
    lists["outlier_weight"] = [joint["outlier_weight"], *(node for node in held if node not in own)]
    set_operands(refresh, **lists)
