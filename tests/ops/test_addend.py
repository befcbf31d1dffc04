"""An addend joins a linear's result in fp32: before its one rounding, or behind a kernel without a place."""

from __future__ import annotations

from typing import Any

import operator_calls
import pytest
import torch
from linear_models import FEATURES, captured
from operator_calls import ARGUMENTS, OPERATORS, SHAPES
from rewriting import FUSED, SHARED, call, nodes_of, run
from torch import Tensor, nn

from mixq_compile.errors import OperandError
from mixq_compile.ops import composition
from mixq_compile.ops.operands import operand, set_operands
from mixq_compile.passes.fuse_activation import FuseActivation
from mixq_compile.passes.fuse_epilogue import FuseEpilogue
from mixq_compile.passes.merge_siblings import MergeSiblings
from mixq_compile.pipeline import PassContext
from mixq_compile.runtime.weight_store import WeightStore

ADDING = ("dequantize", "mixed_linear", "weight_only_linear")
LABELS = ("plain", "three_dimensions", "one_row", "no_rows", "ragged", "four_bits", "weight_only", "vector")


def given(name: str, label: str, kernel: str = "ref") -> tuple[Any, dict[str, Any]]:
    shape = SHAPES[label]
    operator = OPERATORS[name]
    arguments = ARGUMENTS[name](operator_calls.tensors(shape), shape)
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    return operator, {**dict(zip(names, arguments, strict=True)), "kernel": kernel}


def random_like(result: Tensor) -> Tensor:
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(result.dtype)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", ADDING)
def test_the_reference_rounds_once(name: str, label: str) -> None:
    """With x in fp32 no rounding hides behind another: the sum is exact in float64, rounded to fp32."""
    operator, operands = given(name, label)
    wide = {**operands, "x": operands["x"].float()}
    addend = random_like(operator(**operands))
    exact = operator(**wide) + addend.float()
    found = operator(**{**operands, "addend": addend})
    assert torch.equal(found, exact.to(found.dtype)), f"mixq::{name} did not add in fp32 before it rounded"


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", ADDING)
def test_behind_a_kernel_without_a_place_it_is_rounded_once_more(name: str, label: str) -> None:
    operator, operands = given(name, label, "cpu")
    plain = operator(**operands)
    addend = random_like(plain)
    found = operator(**{**operands, "addend": addend})
    assert torch.equal(found, (plain.float() + addend.float()).to(plain.dtype))


@pytest.mark.parametrize("name", ADDING)
def test_an_addend_that_does_not_fit_is_named(name: str) -> None:
    operator, operands = given(name, "plain")
    for shape in ((5, 31), (4, 32), (32,), (5, 1)):
        with pytest.raises(OperandError, match="addend"):
            operator(**{**operands, "addend": torch.zeros(shape)})
        fakes = {
            name: value.to("meta") if isinstance(value, Tensor) else value
            for name, value in {**operands, "addend": torch.zeros(shape)}.items()
        }
        with pytest.raises(OperandError, match="addend"):
            operator(**fakes)


@pytest.mark.parametrize("how", ["one operator", "two operators", "weight-only"])
@pytest.mark.parametrize("call", [composition.run_operator, composition.run_kernel])
def test_a_composition_adds_it(how: str, call: composition.Call) -> None:
    shape = SHAPES["plain"]
    addend = torch.full((*shape.leading, shape.out_features), 1000.0)

    def composed(**more: Any) -> Tensor:
        t = operator_calls.tensors(shape)
        operands: composition.Given = {
            **t.state.named_buffers(), "x": t.x, "weight_codes": t.codes, "weight_scale": t.scale,
            "bias": t.bias, "cached_index": t.cached_index, "original": t.original,
            "outlier_weight": t.outlier_weight, "format": "int8", "miss": "exact", "small_m": 0,
            "kernel": "ref", **more,
        }  # fmt: skip
        if how == "weight-only":
            return composition.weight_only(operands, call)  # type: ignore[no-any-return]
        fused = how == "one operator"
        return composition.compose(operands, call, refreshes=True, fused=fused)  # type: ignore[no-any-return]

    assert torch.equal(composed(addend=addend), composed() + addend)
    assert torch.equal(composed(addend=None), composed())


def planted(graph: Any, nodes: list[torch.fx.Node]) -> list[torch.fx.Node]:
    added = []
    for place, node in enumerate(nodes):
        addend = graph.attach(f"addend_{place}", torch.full(graph.value(node).shape, 100.0))
        set_operands(node, addend=addend)
        added.append(addend)
    return added


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 96)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(x))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 96), nn.Linear(96, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 32), nn.Linear(FEATURES, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def reasons(pass_: Any, graph: Any) -> list[str]:
    context = PassContext(weights=WeightStore())
    return [f"{each.verdict}: {each.reason}" for each in pass_.run(graph, context)]


def test_a_fused_epilogue_hands_it_on() -> None:
    graph = captured(FeedForward(), "dynamo")
    run(graph, SHARED)
    (addend,) = planted(graph, nodes_of(graph, "dequantize"))
    reasons(FuseEpilogue(), graph)
    (fused,) = nodes_of(graph, "mixed_linear")
    assert operand(fused, "addend") is addend
    x = torch.ones(6, FEATURES)
    assert call(graph, x).min() > 90, "the addend was lost"


def test_a_fused_activation_function_has_no_place_for_it_and_says_so() -> None:
    graph = captured(TwoLayers(), "dynamo")
    run(graph, FUSED)
    products = nodes_of(graph, "mixed_linear")
    planted(graph, products[:1])
    (found,) = reasons(FuseActivation(), graph)
    assert found.startswith("skipped")
    assert "has no place for its addend" in found
    assert nodes_of(graph, "mixed_linear") == products, "a product was replaced by one without the addend"


@pytest.mark.parametrize("which", ["each its own", "one for both", "only one has"])
def test_siblings_with_addends_keep_a_product_each(which: str) -> None:
    graph = captured(Siblings(), "dynamo")
    run(graph, FUSED)
    products = nodes_of(graph, "mixed_linear")
    added = planted(graph, products[:1] if which == "only one has" else products)
    if which == "one for both":
        set_operands(products[1], addend=added[0])
    (found,) = reasons(MergeSiblings(when="always"), graph)
    assert found.startswith("skipped: a product adds what has a column for each of its outputs: addend_0")
    assert nodes_of(graph, "mixed_linear") == products
