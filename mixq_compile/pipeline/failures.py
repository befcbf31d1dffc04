"""Errors of a running pipeline: which pass, which node, which line of the model, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from mixq_compile.errors import PipelineError, VerificationError
from mixq_compile.ir.graph import CapturedGraph, is_erased
from mixq_compile.ir.snapshot import row_of
from mixq_compile.ir.verify import Violation, shortened
from mixq_compile.pipeline.history import History, PassRecord


class PassError(PipelineError):
    """A pass raised; `__cause__` is what it raised."""

    def __init__(self, message: str, record: PassRecord, history: History) -> None:
        super().__init__(message)
        self.record = record
        """The pass that failed, with its decisions up to then."""
        self.history = history
        """The run up to and including that pass."""


class PassVerificationError(PassError, VerificationError):
    """A pass left a graph whose records contradict what its operators compute."""


def describe_node(graph: CapturedGraph, node: Node | None) -> list[str]:
    """A node, its layer and its Python line, a line each; nothing where there is no node."""
    if node is None or is_erased(node):
        return []
    row = row_of(graph, node)
    parts = (("node", row.line), ("layer", row.fqn), ("python", row.where))
    return [f"  {name}: {text}" for name, text in parts if text]


def pass_failure(
    graph: CapturedGraph, node: Node | None, record: PassRecord, history: History, cause: Exception
) -> PassError:
    """The error for a pass that raised `cause` while it looked at `node`."""
    lines = [
        f"pass {record.index}, {record.spec}, failed.",
        *describe_node(graph, node),
        f"  why: {type(cause).__name__}: {shortened(str(cause))}",
        f"  what to do: leave {record.spec} out of the pipeline to go on without it, or find the one rewrite "
        f"with fuel (it failed after {record.count('applied')} of its own); then report it with this text.",
    ]
    kind = PassVerificationError if isinstance(cause, VerificationError) else PassError
    return kind("\n".join(lines), record, history)


def verification_failure(
    graph: CapturedGraph, violations: Sequence[Violation], record: PassRecord, history: History
) -> PassVerificationError:
    """The error for a pass that left violations behind."""
    nodes = {node.name: node for node in graph.graph.nodes}
    lines = [
        f"pass {record.index}, {record.spec}, left a graph that does not hold ({len(violations)} findings)."
    ]
    for violation in violations[:10]:
        lines += describe_node(graph, nodes.get(violation.node))
        lines.append(f"  why: {violation.message}")
    lines.append(
        f"  what to do: this is a mistake in {record.spec}, not in the model. Leave it out of the pipeline, "
        "or lower the fuel to find the rewrite; then report it with this text."
    )
    return PassVerificationError("\n".join(lines), record, history)
