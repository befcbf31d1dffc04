"""Operators that no pipeline writes yet: passes know them by their traits and operands alone."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES, capture
from rewriting import call, mixq_calls, nodes_of
from torch import Tensor, nn

from mixq_compile.formats import TensorFormat
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operand
from mixq_compile.ops.outlier_state import STATE_FIELDS, OutlierState
from mixq_compile.passes._kernel_queries import kernel_query
from mixq_compile.passes.select_kernels import SelectKernels
from mixq_compile.passes.share_quantize import ShareQuantize
from mixq_compile.pipeline import PassContext
from mixq_compile.runtime.weight_store import WeightStore
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights.recipe import make

FEATURES = 32
mixq = torch.ops.mixq


class Grouped(nn.Module):
    """Two linears in groups that each quantize the one value, with zero points, in these formats."""

    def __init__(self, formats: tuple[str, str] = ("uint8", "uint8")) -> None:
        super().__init__()
        self.formats = formats
        state = OutlierState.create(FEATURES, 16, 6.0, "cpu")
        for name, buffer in zip(STATE_FIELDS, state.buffers(), strict=True):
            self.register_buffer(name, buffer)
        matrix = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0))
        for name, tensor in (
            make(WeightRecipe.parse("uint4/16 absmax"), matrix, torch.float32).named().items()
        ):
            self.register_buffer(name, tensor)
        self.register_buffer("outlier_weight", torch.zeros(FEATURES, 16))

    def product(self, x: Tensor, format: str) -> Tensor:
        codes, scale, zero, outliers = mixq.quantize_affine.default(
            x, self.index, self.column_slot, self.counters, format, "auto"
        )
        addend = (scale * zero)[..., None].expand(*zero.shape, FEATURES)
        result: Tensor = mixq.grouped_linear.default(
            codes, scale, outliers, self.counters, self.weight_codes, self.weight_scale, self.weight_zero,
            self.outlier_weight, None, addend, "uint4/16", "auto",
        )  # fmt: skip
        return result

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.formats[0]) + self.product(x, self.formats[1]).relu()


def captured(route: str, *formats: str) -> tuple[nn.Module, CapturedGraph, Tensor]:
    model = Grouped(formats) if formats else Grouped()  # type: ignore[arg-type]
    x = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(1))
    return model, capture(model, x, route=route), x


@pytest.mark.parametrize("route", ROUTES)
def test_a_kernel_is_asked_for_with_the_formats_that_operands_say(route: str) -> None:
    _, graph, _ = captured(route)
    product = kernel_query(graph, nodes_of(graph, "grouped_linear")[0])
    assert (product.op, product.weight) == ("grouped_linear", TensorFormat.parse("uint4/16"))
    quantization = kernel_query(graph, nodes_of(graph, "quantize_affine")[0])
    assert (quantization.op, quantization.activation) == ("quantize_affine", TensorFormat.parse("uint8"))


@pytest.mark.parametrize("route", ROUTES)
def test_kernels_are_selected(route: str) -> None:
    model, graph, x = captured(route)
    decisions = list(SelectKernels().run(graph, PassContext(weights=WeightStore())))
    assert [decision.verdict for decision in decisions] == ["applied"] * 4
    for name in ("quantize_affine", "grouped_linear"):
        assert {operand(node, "kernel") for node in nodes_of(graph, name)} == {"ref"}
    assert torch.equal(call(graph, x), model(x))


@pytest.mark.parametrize("route", ROUTES)
def test_one_quantization_is_shared(route: str) -> None:
    model, graph, x = captured(route)
    decisions = list(ShareQuantize().run(graph, PassContext(weights=WeightStore())))
    assert [decision.verdict for decision in decisions] == ["applied"]
    assert mixq_calls(graph) == ["quantize_affine", "grouped_linear", "grouped_linear"]
    assert torch.equal(call(graph, x), model(x))


def test_another_format_is_not_shared() -> None:
    _, graph, _ = captured("export", "uint8", "uint4")
    decisions = list(ShareQuantize().run(graph, PassContext(weights=WeightStore())))
    assert [decision.verdict for decision in decisions] == ["skipped", "skipped"]
    assert mixq_calls(graph).count("quantize_affine") == 2
