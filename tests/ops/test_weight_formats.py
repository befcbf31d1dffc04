"""A weight-only linear with groups and zero points: the weight is `(codes - zero) * scale`, in any layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_models import FEATURES, captured
from operator_calls import formatted_weight
from rewriting import call, nodes_of, run
from torch import Tensor, nn

from mixq_compile import ops
from mixq_compile.errors import KernelError, OperandError, OptionError
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.operands import operand, set_operands
from mixq_compile.ops.providers import KernelQuery, rejections
from mixq_compile.passes._kernel_queries import kernel_query
from mixq_compile.passes.merge_siblings import MergeSiblings
from mixq_compile.pipeline import PassContext
from mixq_compile.runtime.weight_store import WeightStore

CPU = torch.device("cpu")
COMPUTED = (
    "int4", "int8", "uint4", "uint8", "int4/16", "int8/16", "uint4/16", "uint8/7", "uint4/128",
    "int2", "int2/16", "uint2/64",
)  # fmt: skip
ROWS, OUT, IN = 3, 10, 51


def spelled_out(weight: TensorFormat, codes: Tensor, scale: Tensor, zero: Tensor | None) -> np.ndarray:
    """The weight in float64, element by element, from the bytes."""
    found = np.zeros((OUT, IN))
    for row in range(OUT):
        for column in range(IN):
            if weight.bits == 8:
                code = int(codes[row, column])
            else:
                each, bits = 8 // weight.bits, weight.bits
                byte = int(codes[row, column // each])
                code = byte >> bits * (column % each) & (1 << bits) - 1
                code -= 1 << bits if weight.signed and code >= 1 << bits - 1 else 0
            place = row if weight.group is None else (row, column // weight.group)
            code -= 0 if zero is None else int(zero[place])
            found[row, column] = np.float32(code) * np.float32(scale[place])
    return found


@pytest.mark.parametrize("text", COMPUTED)
def test_it_multiplies_what_the_bytes_stand_for(text: str) -> None:
    weight = TensorFormat.parse(text)
    codes, scale, zero = formatted_weight(weight, OUT, IN)
    x = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(1))
    bias, addend = torch.ones(OUT), torch.full((ROWS, OUT), 2.0)
    found = ops.weight_only_linear(x, codes, scale, bias, "auto", addend, zero, text)
    expected = (x.double().numpy() @ spelled_out(weight, codes, scale, zero).T).astype(np.float32) + 1 + 2
    np.testing.assert_allclose(found.numpy(), expected, rtol=3e-6, atol=1e-4)


@pytest.mark.parametrize("text", ["int8", "int4"])
def test_a_format_that_the_dtype_tells_changes_nothing(text: str) -> None:
    codes, scale, _ = formatted_weight(TensorFormat.parse(text), OUT, IN)
    x = torch.randn(ROWS, IN)
    for kernel in ("auto", "cpu", "ref"):
        plain = ops.weight_only_linear(x, codes, scale, None, kernel)
        assert torch.equal(ops.weight_only_linear(x, codes, scale, None, kernel, weight_format=text), plain)


def test_a_text_that_is_no_format_is_refused() -> None:
    codes, scale, _ = formatted_weight(TensorFormat(8), OUT, IN)
    for text in ("int3", "q4_0"):
        for x in (torch.randn(ROWS, IN), torch.empty(ROWS, IN, device="meta")):
            there = (codes.to(x.device), scale.to(x.device))
            with pytest.raises(OptionError, match="format"):
                ops.weight_only_linear(x, *there, None, "auto", weight_format=text)


@pytest.mark.parametrize("kernel", ["cpu", "tl"])
def test_a_named_kernel_without_a_place_refuses(kernel: str) -> None:
    codes, scale, zero = formatted_weight(TensorFormat.parse("uint4/16"), OUT, IN)
    message = f"kernel '{kernel}' of mixq::weight_only_linear has no place for weight_format, weight_zero"
    with pytest.raises(KernelError, match=message):
        ops.weight_only_linear(torch.randn(ROWS, IN), codes, scale, None, kernel, None, zero, "uint4/16")


WRONG = {
    "a scale for each row": ("int4/16", lambda c, s, z: (c, s[:, 0], z), r"has the shape \[10\]"),
    "too few groups": ("int4/16", lambda c, s, z: (c, s[:, 1:], z), r"it must be \[10, 4\]"),
    "no zero points": ("uint4/16", lambda c, s, z: (c, s, None), "weight_zero is missing"),
    "zero points of signed codes": (
        "int4/16", lambda c, s, z: (c, s, s.to(torch.uint8)), "weight_zero was given",
    ),
    "zero points of rows": ("uint4/16", lambda c, s, z: (c, s, z[:, 0]), r"weight_zero has the shape \[10\]"),
    "signed zero points": ("uint4/16", lambda c, s, z: (c, s, z.to(torch.int8)), "has the dtype int8"),
    "codes in bytes": ("int8/16", lambda c, s, z: (c[:, :26], s, z), r"it must be \[10, 51\]"),
    "codes without sign": ("int8/16", lambda c, s, z: (c.to(torch.uint8), s, z), "has the dtype uint8"),
    "packed codes": ("int4/16", lambda c, s, z: (c[:, 1:], s, z), r"it must be \[10, 26\]"),
    "half scales": ("int4/16", lambda c, s, z: (c, s.half(), z), "weight_scale has the dtype float16"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_the_format_are_named(name: str, place: str) -> None:
    text, change, message = WRONG[name]
    parts = change(*formatted_weight(TensorFormat.parse(text), OUT, IN))
    codes, scale, zero = (None if part is None else part.to(place) for part in parts)
    x = torch.randn(ROWS, IN, device=place)
    with pytest.raises(OperandError, match=message):
        ops.weight_only_linear(x, codes, scale, None, "ref", None, zero, text)


def test_zero_points_without_a_format_are_never_ignored() -> None:
    codes, scale, _ = formatted_weight(TensorFormat(4), OUT, IN)
    zero = torch.full((OUT,), 8, dtype=torch.uint8)
    with pytest.raises(OperandError, match="weight_zero was given"):
        ops.weight_only_linear(torch.randn(ROWS, IN), codes, scale, None, "auto", weight_zero=zero)


def test_groups_without_a_format_are_never_read_as_rows() -> None:
    codes, scale, _ = formatted_weight(TensorFormat.parse("int4/16"), OUT, IN)
    with pytest.raises(OperandError, match=r"weight_scale has 2 dimensions \[10, 4\]"):
        ops.weight_only_linear(torch.randn(ROWS, IN), codes, scale, None, "auto")


def test_a_query_without_the_operand_is_refused() -> None:
    """Whoever would write a call that does not say how its weight lies must not be told that it can."""
    query = KernelQuery("weight_only_linear", CPU, torch.float32, TensorFormat.parse("int4/16"), None)
    chosen, refused = rejections(query)
    assert chosen is None
    assert "not with int4/16" in refused["ref"]


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 32), nn.Linear(FEATURES, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) * self.second(x)
        return result


def test_passes_ask_about_the_format_that_a_call_says() -> None:
    graph = captured(Siblings(), "dynamo")
    run(
        graph, "strip-guards,canonicalize-linear,select-scheme{default=w8a16 force=true},rewrite-mixed-linear"
    )
    node = nodes_of(graph, "weight_only_linear")[0]
    assert kernel_query(graph, node).operands == frozenset()
    set_operands(node, weight_format="int8/16")
    query = kernel_query(graph, node)
    assert query.weight == TensorFormat.parse("int8/16")
    assert query.operands == {"weight_format"}


def test_siblings_with_zero_points_become_one() -> None:
    graph = captured(Siblings(), "dynamo")
    store = WeightStore()
    run(
        graph,
        "strip-guards,canonicalize-linear,select-scheme{default=w8a16 force=true},rewrite-mixed-linear",
        weights=store,
    )
    weight = TensorFormat.parse("uint4/16")
    nodes = nodes_of(graph, "weight_only_linear")
    for place, node in enumerate(nodes):
        parts = formatted_weight(weight, 32, FEATURES, seed=place)
        names = ("weight_codes", "weight_scale", "weight_zero")
        attached = {
            name: graph.attach(f"{name}_{place}", part) for name, part in zip(names, parts, strict=True)
        }
        set_operands(node, weight_format="uint4/16", kernel="ref", **attached)
    x = torch.randn(6, FEATURES)
    apart = call(graph, x)
    decisions = list(MergeSiblings(when="always").run(graph, PassContext(weights=store)))
    assert [decision.verdict for decision in decisions] == ["applied"], decisions[0].reason
    (joint,) = nodes_of(graph, "weight_only_linear")
    for name, shape in (("weight_codes", (64, 32)), ("weight_scale", (64, 4)), ("weight_zero", (64, 4))):
        assert tuple(graph.value(operand(joint, name)).shape) == shape, name
    assert operand(joint, "weight_format") == "uint4/16"
    assert torch.equal(call(graph, x), apart), "the joint product read another's zero points"
