"""Rows that pad a batch teach nothing: with them, masked, the state is what it is without them, bit for bit.

The same cases run on the Triton kernels in their interpreter (tests/kernels/test_triton_interpreter.py).
"""

from __future__ import annotations

import edge_cases
import pytest
import torch
from edge_cases import POLICIES
from linear_models import captured
from rewriting import FUSED, SHARED, nodes_of, run
from torch import nn

import mixq_compile.kernels.ref.quantization as reference
from mixq_compile import ops
from mixq_compile.errors import KernelError, OperandError
from mixq_compile.ops import providers
from mixq_compile.ops.operands import operand, set_operands
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.passes.fuse_activation import FuseActivation
from mixq_compile.passes.share_quantize import ShareQuantize
from mixq_compile.pipeline import PassContext
from mixq_compile.runtime.weight_store import WeightStore

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("miss", POLICIES)
@pytest.mark.parametrize("kernel", ["ref", "cpu"])
def test_padding_teaches_nothing(kernel: str, miss: str, dtype: torch.dtype) -> None:
    edge_cases.check_padding_teaches_nothing(kernel, miss, dtype, "cpu")


@pytest.mark.parametrize("kernel", ["ref", "cpu"])
def test_a_batch_of_padding_alone_leaves_the_state_as_it_was(kernel: str) -> None:
    for miss in POLICIES:
        state = OutlierState.create(32, 16, 6.0, "cpu")
        mask = torch.zeros(2, 3, dtype=torch.bool)
        x = torch.full((2, 3, 32), 50.0)
        codes, _, _, used = ops.quantize_online(x, *state.buffers(), "int8", miss, 0, kernel, mask)
        assert state.columns() == [], f"{miss} learned {state.columns()} from rows that teach nothing"
        assert state.counters.tolist() == [0, 0, 0, 0]
        assert state.effective_threshold.tolist() == [6.0]
        assert int(used) == 0
        assert codes.eq(127).all(), "rows that teach nothing are quantized as all others are"


@pytest.mark.parametrize("kernel", ["ref", "cpu"])
def test_a_mask_may_have_any_strides(kernel: str) -> None:
    x = torch.zeros(3, 2, 32)
    x[0, 0, 4], x[2, 1, 9], x[1, 0, 20] = 30.0, 40.0, 50.0
    kept = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.bool).T
    assert not kept.is_contiguous()
    state = OutlierState.create(32, 16, 6.0, "cpu")
    ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, kernel, kept)
    assert state.columns() == [4, 9]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, dtype=torch.bool), r"row_mask has the leading dimensions \[4\]: x has \[5\]"),
        (torch.ones(5, dtype=torch.int64), "row_mask has the dtype int64: it must be bool"),
        (torch.ones(5, 1, dtype=torch.bool), r"row_mask has the leading dimensions \[5, 1\]"),
    ],
    ids=["too few", "no bool", "too many dimensions"],
)
def test_a_mask_that_does_not_fit_is_named(mask: torch.Tensor, message: str) -> None:
    state = OutlierState.create(32, 16, 6.0, "cpu")
    for make in (lambda tensor: tensor, lambda tensor: tensor.to("meta")):
        arguments = [make(tensor) for tensor in (torch.full((5, 32), 9.0), *state.buffers())]
        with pytest.raises(OperandError, match=message):
            ops.quantize_online(*arguments, "int8", "exact", 0, "auto", make(mask))
    assert state.columns() == []


def test_a_kernel_without_a_place_for_it_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(x, index, column_slot, column_max, counters, effective_threshold, format, miss, small_m):  # type: ignore[no-untyped-def]
        return reference.quantize_online(
            x, index, column_slot, column_max, counters, effective_threshold, format, miss, small_m
        )

    providers.load_providers()
    monkeypatch.setitem(
        providers._PROVIDERS, "quantize_online", dict(providers._PROVIDERS["quantize_online"])
    )
    providers.provider("quantize_online", name="lacking", priority=99, supports=lambda query: True)(lacking)
    providers._chosen_with.cache_clear()
    providers.choose.cache_clear()
    try:
        query = providers.KernelQuery("quantize_online", torch.device("cpu"), torch.float32)
        assert providers.choose(query).name == "lacking"
        masked = providers.KernelQuery(
            "quantize_online", torch.device("cpu"), torch.float32, operands=frozenset({"row_mask"})
        )
        chosen, refused = providers.rejections(masked)
        assert chosen is not None
        assert chosen.name != "lacking"
        assert refused["lacking"] == "it has no place for row_mask"
        state = OutlierState.create(32, 16, 6.0, "cpu")
        x, mask = torch.full((2, 32), 50.0), torch.zeros(2, dtype=torch.bool)
        ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "auto", mask)
        assert state.columns() == [], "the mask was ignored"
        with pytest.raises(KernelError, match="'lacking' of mixq::quantize_online has no place for row_mask"):
            ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "lacking", mask)
    finally:
        providers._chosen_with.cache_clear()
        providers.choose.cache_clear()


class TwoReaders(nn.Module):
    """Two linears that read one value, beside two masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.first(x) + self.second(x)
        return result


@pytest.mark.parametrize("which", ["one has none", "two masks", "the same"])
def test_quantizations_share_where_their_masks_are_one(which: str) -> None:
    graph = captured(TwoReaders(), "dynamo")
    store = WeightStore()
    run(graph, SHARED.removesuffix(",share-quantize"), weights=store)
    quantizations = nodes_of(graph, "quantize_online")
    rows = graph.value(operand(quantizations[0], "x")).shape[:-1]
    mask, other = (graph.attach(name, torch.ones(rows) > 0) for name in ("mask", "other_mask"))
    given = {"one has none": (mask,), "two masks": (mask, other), "the same": (mask, mask)}[which]
    for node, chosen in zip(quantizations, given, strict=False):
        set_operands(node, row_mask=chosen)
    found = {decision.reason for decision in ShareQuantize().run(graph, PassContext(weights=store))}
    left = nodes_of(graph, "quantize_online")
    if which == "the same":
        assert len(left) == 1
        assert operand(left[0], "row_mask") is mask
    else:
        assert len(left) == 2, "a quantization that learns from every row was replaced by one that does not"
        assert {reason.partition(":")[0] for reason in found} == {
            "reads a value that others quantize with another scheme, policy or columns"
        }


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.relu(self.up(x)))
        return result


def test_a_fused_quantization_has_no_place_for_it_and_says_so() -> None:
    graph = captured(FeedForward(), "dynamo")
    run(graph, FUSED)
    second = nodes_of(graph, "quantize_online")[1]
    mask = graph.attach("mask", torch.ones(graph.value(operand(second, "x")).shape[:-1]) > 0)
    set_operands(second, row_mask=mask)
    found = [decision.reason for decision in FuseActivation().run(graph, PassContext(weights=WeightStore()))]
    assert ["has no place for its row_mask" in reason for reason in found] == [True], found
    assert operand(nodes_of(graph, "quantize_online")[1], "row_mask") is mask
