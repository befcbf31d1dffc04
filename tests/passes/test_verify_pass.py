"""`verify`: a graph that does not hold is named by the pass."""

from __future__ import annotations

import pytest
import torch
from linear_models import captured, network
from rewriting import WHOLE, decisions, nodes_of, run

from mixq_compile.errors import VerificationError
from mixq_compile.pipeline import Pipeline


def test_a_graph_that_holds_is_noted() -> None:
    graph = captured(network(), "dynamo")
    (decision,) = decisions(run(graph, WHOLE), "verify")
    assert (decision.verdict, decision.reason) == ("noted", "8 operators hold")


def test_a_wrong_shape_is_an_error_with_the_nodes_name() -> None:
    graph = captured(network(), "dynamo")
    run(graph, WHOLE)
    node = nodes_of(graph, "mixed_linear")[0]
    graph.set_value(node, torch.empty(3, 3, device="meta"))
    with pytest.raises(VerificationError, match=rf"1 violation\(s\) after the rewrites:\n  {node.name}: "):
        Pipeline.parse("verify").run(graph)
