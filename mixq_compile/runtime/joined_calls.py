"""Two calls become one where a graph is lowered: on a GPU each costs the host as much as a small product.

Nothing of this is in the graph that passes and people see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mixq_compile.ir.effects import has_effect
from mixq_compile.ops.operands import operands, results, signature_of

mixq = torch.ops.mixq
JOINED = mixq.quantize_and_refresh.default


def join_calls(module: GraphModule) -> int:
    """Joins each quantization that learns with the refresh behind it, in place; returns how many."""
    pairs = [
        (node, refresh)
        for node in module.graph.nodes
        if node.target is mixq.quantize_online.default and (refresh := _refresh_of(node)) is not None
    ]
    for quantize, refresh in pairs:
        _join(module, quantize, refresh)
    if pairs:
        module.recompile()
    return len(pairs)


def _refresh_of(quantize: Node) -> Node | None:
    """The refresh that alone takes what a quantization returned, where nothing with an effect is between."""
    items = {item: name for name, item in results(quantize)}
    readers = {
        reader
        for item in items
        for reader in item.users
        if reader.target is mixq.refresh_outlier_weights.default
    }
    if len(readers) != 1:
        return None
    (refresh,) = readers
    given, made = operands(refresh), operands(quantize)
    taken = {name: items.get(given[name]) for name in ("codes", "count")}
    same = all(given[name] == made[name] for name in ("index", "small_m"))
    if not same or any(name != source for name, source in taken.items()):
        return None
    node = quantize.next
    while node is not refresh:
        is_read_early = node not in items and any(source in items for source in node.all_input_nodes)
        if is_read_early or (node.op not in ("placeholder", "get_attr") and has_effect(node)):
            return None
        node = node.next
    return refresh


def _join(module: GraphModule, quantize: Node, refresh: Node) -> None:
    given: dict[str, Any] = {**operands(refresh), **operands(quantize)}
    given["refresh_kernel"] = operands(refresh)["kernel"]
    signature = signature_of(JOINED)
    args, kwargs = signature.arrange(signature.select(given))
    with module.graph.inserting_before(refresh):
        joined = module.graph.call_function(JOINED, args, kwargs)
    joined.meta = dict(quantize.meta)
    for item in list(quantize.users):
        joined.append(item)
    quantize.replace_all_uses_with(joined)
    module.graph.erase_node(refresh)
    module.graph.erase_node(quantize)
