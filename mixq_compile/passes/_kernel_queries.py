"""What passes ask providers about the calls of a graph."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mixq_compile.errors import PipelineError
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.operands import given_operands, operand, operands, signature_of
from mixq_compile.ops.traits import Traits, traits_of
from mixq_compile.ops.weight_codes import format_of

REFERENCE = "ref"


def kernel_query(graph: CapturedGraph, node: Node, operator: Any = None) -> providers.KernelQuery:
    """The query for the kernel of a `mixq::` call, or of the operator that would take its operands.

    Raises PipelineError where that is none of this package's operators.
    """
    target = node.target if operator is None else operator
    traits = traits_of(target)
    if traits is None:
        raise PipelineError(f"{target} is no operator of mixq_compile: no provider has a kernel for it.")
    source = operand(node, traits.source)
    value = graph.value(source[0] if isinstance(source, (list, tuple)) else source)
    signature, given = signature_of(target), given_operands(node)
    optional = frozenset(
        name for name, default in signature.defaults.items() if given.get(name, default) != default
    )
    formats = _weight_format(graph, node, traits), _activation_format(node)
    return providers.KernelQuery(traits.name, value.device, value.dtype, *formats, operands=optional)


def _weight_format(graph: CapturedGraph, node: Node, traits: Traits) -> TensorFormat:
    """The format of the weight that a product reads: said by an operand, or by the codes' dtype."""
    text = given_operands(node).get("weight_format")
    if text:
        return TensorFormat.parse(text)
    return format_of(graph.value(operand(node, "weight_codes"))) if traits.product else INT8


def _activation_format(node: Node) -> TensorFormat:
    """The format of the codes that a call writes, where it says one."""
    text = operands(node).get("format")
    return INT8 if text is None else TensorFormat.parse(text)


def why_only_reference(graph: CapturedGraph, node: Node, operator: Any) -> str | None:
    """Why no kernel but the slow reference has an operator, for these operands; None where one has."""
    query = kernel_query(graph, node, operator)
    chosen, refused = providers.rejections(query)
    if chosen is not None and chosen.name != REFERENCE:
        return None
    reasons = "".join(f" ({name}: {reason})" for name, reason in refused.items())
    return f"no kernel does both on {query.device.type}{reasons}"
