import dataclasses

import pytest
import torch
from captures import capture
from inspected_models import llama_inspection, run_history
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.inspection import layers
from mixq_compile.inspection.blast_radius import layer_of, touches
from mixq_compile.inspection.layers import (
    NEVER_REWRITTEN,
    LayerSummary,
    layers_of,
    matching,
    sizes,
)
from mixq_compile.pipeline import History, PassContext, Pipeline
from mixq_compile.runtime.linear_records import linear_records
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.schemes.registry import get_scheme, scheme_names

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def history() -> History:
    return llama_inspection().graphs[0].history


def test_every_linear_is_a_layer_in_the_order_in_which_they_run(history: History) -> None:
    names = [layer.fqn.rpartition(".")[2] for layer in layers_of(history)]
    assert names == [*PROJECTIONS, *PROJECTIONS, "lm_head"]


def test_a_layer_has_its_shape_scheme_kernel_and_bytes(history: History) -> None:
    (down,) = (layer for layer in layers_of(history) if layer.fqn == "model.layers.1.mlp.down_proj")
    assert (down.out_features, down.in_features, down.dtype, down.role) == (32, 64, "float32", "down")
    assert (down.scheme, down.kernel, down.skip) == ("w8a8o16", "ref", None)
    assert (down.weight_bits, down.activation_bits, down.capacity) == (8, 8, 16)
    assert down.bytes_before == 32 * 64 * 4
    assert down.bytes_after == 32 * 64 + 32 * 4 + 16 * (32 * 4 + 4)
    assert "down_proj" in down.where


def test_a_layer_that_was_left_alone_says_why(history: History) -> None:
    head = layers_of(history)[-1]
    assert head.scheme is None
    assert "lm_head" in (head.skip or "")
    assert head.bytes_after == head.bytes_before


def test_a_layer_whose_rewrite_had_no_fuel_says_so() -> None:
    whole = run_history()
    names = [record.spec.partition("{")[0] for record in whole.records]
    before = whole.records[: names.index("rewrite-mixed-linear")]
    fuel = sum(record.count("applied") for record in before) + 3
    layers = [layer for layer in layers_of(run_history(fuel)) if layer.fqn != "lm_head"]
    rewritten = [layer for layer in layers if layer.scheme is not None]
    left = [layer for layer in layers if layer.scheme is None]
    assert (len(rewritten), len(left)) == (3, 11)
    assert {layer.skip for layer in left} == {NEVER_REWRITTEN}
    assert all(layer.bytes_after == layer.bytes_before for layer in left)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("lm_head", 1), ("q_proj", 2), ("model.layers.0.*", 7), ("*.down_proj", 2), ("absent", 0)],
)
def test_a_pattern_is_a_name_a_part_of_one_or_a_glob(history: History, pattern: str, count: int) -> None:
    assert len(matching([layer.fqn for layer in layers_of(history)], pattern)) == count


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("float32[2, 64]", ("float32", 32, (2, 64))),
        ("bfloat16[s0, 64] cuda:0", ("bfloat16", 16, (0, 64))),
        ("int8[]", ("int8", 8, ())),
        ("(int8[4], float32[4])", ("", 0, ())),
        ("", ("", 0, ())),
    ],
)
def test_sizes_are_read_from_a_described_value(value: str, expected: object) -> None:
    assert sizes(value) == expected


def test_a_node_lies_in_the_layer_that_it_is_a_part_of() -> None:
    known = {"model.layers.0.mlp.up_proj"}
    assert layer_of("model.layers.0.mlp.up_proj.weight.codes", known) == "model.layers.0.mlp.up_proj"
    assert layer_of("model.layers.0.mlp", known) is None
    assert layer_of("", known) is None


def test_the_blast_radius_counts_what_a_pass_did_to_each_layer(history: History) -> None:
    layers = layers_of(history)
    by_name = {record.spec.partition("{")[0]: touches(record, layers) for record in history.records}
    rewritten = by_name["rewrite-mixed-linear"]
    assert set(rewritten) == {layer.fqn for layer in layers if layer.scheme is not None}
    touch = rewritten["model.layers.0.mlp.down_proj"]
    assert (touch.removed, touch.applied) == (1, 1)
    assert touch.added >= 10
    assert touch.mark.startswith(f"+{touch.added} -1")
    assert by_name["select-scheme"]["lm_head"].skipped == 1
    assert by_name["verify"] == {}


class Pair(nn.Module):
    """Two linears that differ in their bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.biased, self.plain = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.biased(x) + self.plain(x)


@pytest.mark.parametrize("scheme", ["w8a8o16", "w4a4o16", "w8a8", "w8a16"])
def test_a_swapped_linear_without_bias_counts_as_one_with_it(scheme: str) -> None:
    graph = capture(
        mixq.quantize(Pair(), scheme=scheme, keep_originals=True), torch.randn(40, 64), route="export"
    )
    history = Pipeline.parse("strip-guards,expand-linear").run(graph, PassContext(weights=STORE))
    biased, plain = layers_of(history)
    assert (biased.scheme, plain.scheme) == (scheme, scheme)
    figures = ("out_features", "in_features", "capacity", "activation_bits", "weight_bits", "bytes_after")
    for figure in figures:
        assert getattr(plain, figure) == getattr(biased, figure), figure
    assert (plain.out_features, plain.in_features) == (32, 64)
    assert plain.capacity == (16 if "o16" in scheme else 0)
    assert plain.activation_bits == {"w8a8o16": 8, "w4a4o16": 4, "w8a8": 8, "w8a16": 32}[scheme]
    assert plain.weight_bits == (4 if scheme == "w4a4o16" else 8)
    assert plain.scheme == scheme


def swapped_layers() -> tuple[LayerSummary, ...]:
    graph = capture(mixq.quantize(Pair()), torch.randn(40, 64), route="export")
    return layers_of(Pipeline.parse("strip-guards,expand-linear").run(graph, PassContext(weights=STORE)))


def test_of_a_swapped_linear_every_scheme_that_it_may_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph tells formats, and several schemes may have the same: naming one of them would be a guess."""
    wide = dataclasses.replace(get_scheme("w8a8o16"), name="w8a8o16_wide")
    known = {name: get_scheme(name) for name in scheme_names()} | {wide.name: wide}
    monkeypatch.setattr(layers, "scheme_names", lambda: tuple(known))
    monkeypatch.setattr(layers, "get_scheme", known.__getitem__)
    assert {layer.scheme for layer in swapped_layers()} == {"w8a8o16 or w8a8o16_wide"}


def test_formats_that_no_scheme_has_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "scheme_names", lambda: ("w8a16",))
    assert {layer.scheme for layer in swapped_layers()} == {"int8 absmax x int8"}


SPELLINGS = {
    "linear": lambda x, rows, columns, bias: nn.functional.linear(x, rows(), bias),
    "linear by name": lambda x, rows, columns, bias: nn.functional.linear(input=x, weight=rows(), bias=bias),
    "addmm": lambda x, rows, columns, bias: torch.addmm(bias, x, columns()),
    "addmm by name": lambda x, rows, columns, bias: torch.addmm(bias, mat1=x, mat2=columns()),
}


class Autocast(nn.Module):
    """A linear that no pass rewrites, because its input, weight and result differ in dtype."""

    def __init__(self, spelling: str, turned: bool) -> None:
        super().__init__()
        self.spelling, self.turned = SPELLINGS[spelling], turned
        self.weight = nn.Parameter(torch.randn(64, 32) if turned else torch.randn(32, 64))
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            views = (lambda: self.weight.t(), lambda: self.weight)
            rows, columns = views if self.turned else views[::-1]
            return self.spelling(x, rows, columns, self.bias)


@pytest.mark.parametrize("turned", [False, True], ids=["N by K", "K by N"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_linear_that_stays_has_its_shape_in_every_spelling(spelling: str, turned: bool) -> None:
    graph = capture(Autocast(spelling, turned), torch.randn(6, 64), route="dynamo")
    history = Pipeline.parse("strip-guards,canonicalize-linear").run(graph, PassContext())
    (layer,) = layers_of(history)
    (record,) = linear_records(graph)
    assert (layer.out_features, layer.in_features) == (32, 64)
    assert (record.out_features, record.in_features) == (32, 64)
