"""`fuse-epilogue`: the product and what dequantizes it become one operator."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES
from linear_models import FEATURES, captured, rows
from rewriting import FUSED, MIXED, call, decisions, mixq_calls, nodes_of, reasons, run, sqnr
from torch import nn

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ops.operands import operand, set_operands


def model(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_product_and_dequantization_become_one(route: str, bias: bool) -> None:
    linear = model(bias)
    graph = captured(linear, route)
    history = run(graph, FUSED)
    assert mixq_calls(graph) == ["quantize_online", "refresh_outlier_weights", "mixed_linear"]
    assert reasons(history, "fuse-epilogue") == {
        "0": "applied: dequantize and bias go into the product's kernel"
    }
    x = rows(6, columns=(3,))
    assert sqnr(linear(x), call(graph, x)) > 35


def test_it_computes_the_same_bits_as_its_parts() -> None:
    linear, x = model(), rows(6, columns=(3,))
    parts, fused = captured(linear, "dynamo"), captured(linear, "dynamo")
    run(parts, f"{MIXED},select-kernels{{kernel=ref}}")
    run(fused, f"{FUSED},select-kernels{{kernel=ref}}")
    assert torch.equal(call(parts, x), call(fused, x))


def test_the_input_and_the_switch_point_come_along() -> None:
    graph = captured(model(), "dynamo")
    run(graph, MIXED)
    (quantized,) = nodes_of(graph, "quantize_online")
    set_operands(quantized, small_m=5)
    x = operand(quantized, "x")
    run(graph, FUSED)
    (fused,) = nodes_of(graph, "mixed_linear")
    assert operand(fused, "x") is x
    assert operand(fused, "small_m") == 5
    assert Annotations(fused).fqn == "0"


@pytest.mark.parametrize("half", ["accumulator", "outlier_product"])
def test_a_product_that_something_else_reads_stays_and_names_the_reader(half: str) -> None:
    graph = captured(model(), "dynamo")
    run(graph, MIXED)
    (dequantized,) = nodes_of(graph, "dequantize")
    with graph.graph.inserting_after(dequantized):
        total = graph.call(torch.sum, (operand(dequantized, half),))
    graph.graph.output_node().args = ((dequantized, total),)
    history = run(graph, FUSED)
    reason = f"something else reads the product: {total.name}"
    assert reasons(history, "fuse-epilogue") == {"0": f"skipped: {reason}"}
    (decision,) = decisions(history, "fuse-epilogue")
    assert decision.details == {"blamed": [total.name]}
    assert "mixed_linear" not in mixq_calls(graph)


def test_a_dequantize_of_something_else_stays() -> None:
    graph = captured(model(), "dynamo")
    run(graph, MIXED)
    (dequantized,) = nodes_of(graph, "dequantize")
    accumulator = operand(dequantized, "accumulator")
    with graph.graph.inserting_before(dequantized):
        doubled = graph.call(torch.ops.aten.mul.Tensor, (accumulator, 2))
    set_operands(dequantized, accumulator=doubled)
    history = run(graph, FUSED)
    assert reasons(history, "fuse-epilogue") == {
        "0": f"skipped: what it reads is no result of mixed_gemm: {doubled.name}"
    }
