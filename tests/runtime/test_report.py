"""`mixq.report`: what was quantized and how, what was not and why, outliers, memory."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from compiling import FEATURES, block, compiled, rows
from linear_models import statistics
from torch import nn

import mixq_compile as mixq


def test_each_linear_of_a_compiled_model() -> None:
    model = block()
    fast = compiled(model)
    fast(rows(columns=(3, 40)))
    report = mixq.report(fast)
    up, down = report.quantized
    (head,) = report.skipped
    assert (up.fqn, up.role, up.out_features, up.in_features) == ("up_proj", "up", 128, 64)
    assert (up.scheme, up.kernel, up.skip, up.outlier_weight_source) == ("w8a8o16", "ref", None, "original")
    assert (up.capacity, up.outlier_columns, up.overflow) == (16, (3, 40), 0)
    assert (down.fqn, down.role, down.in_features) == ("down_proj", "down", 128)
    assert (head.fqn, head.scheme, head.skip) == ("lm_head", None, "ignored: its name matches 'lm_head'")
    assert report.graphs == 1
    assert report.fallbacks == ()


def test_memory_before_and_after() -> None:
    model = block(dtype=torch.bfloat16)
    fast = compiled(model)
    fast(rows().bfloat16())
    for linear in mixq.report(fast).quantized:
        weight = linear.out_features * linear.in_features
        assert linear.bytes_before == 2 * weight
        codes, scale, cache, index = weight, 4 * linear.out_features, 2 * 16 * linear.out_features, 4 * 16
        assert linear.bytes_after == codes + scale + cache + index
        assert linear.float_weight_kept
    head = mixq.report(fast).skipped[0]
    assert head.bytes_after == head.bytes_before
    assert not head.float_weight_kept


def test_the_same_of_the_compiled_the_plain_and_a_part_of_the_model() -> None:
    model = block()
    fast = compiled(model)
    fast(rows())
    assert mixq.report(model) == mixq.report(fast)
    assert [linear.fqn for linear in mixq.report(model.up_proj).quantized] == ["up_proj"]


def test_a_swapped_model_before_and_after_compiling() -> None:
    model = mixq.quantize(block())
    plain = mixq.report(model)
    assert [linear.fqn for linear in plain.quantized] == ["up_proj", "down_proj"]
    assert plain.graphs == 0
    assert {linear.outlier_weight_source for linear in plain.quantized} == {"codes"}
    fast = compiled(model)
    fast(rows(columns=(3,)))
    report = mixq.report(fast)
    assert report.graphs == 1
    assert report.quantized[0].outlier_columns == (3,)
    assert [linear.fqn for linear in report.skipped] == ["lm_head"]


def test_a_weight_that_was_replaced_is_reported_once() -> None:
    model = block()
    fast = compiled(model)
    fast(rows())
    model.up_proj.weight = nn.Parameter(torch.randn(128, FEATURES), requires_grad=False)
    fast(rows(columns=(3,)))
    report = mixq.report(fast)
    assert [linear.fqn for linear in report.linears].count("up_proj") == 1
    assert next(linear for linear in report.quantized if linear.fqn == "up_proj").outlier_columns == (3,)


def test_computed_weights_are_listed_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(FEATURES, FEATURES)
            self.inner = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up_proj(nn.functional.linear(x, self.inner.weight * 2))

    model = Scaled().eval().requires_grad_(False)
    fast = compiled(model)
    fast(rows())
    assert {linear.fqn: linear.skip for linear in mixq.report(fast).skipped} == {
        "inner": "its weight is computed, not a parameter"
    }


def test_experts_are_listed_by_both_entrances() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval().requires_grad_(False)
    fast = compiled(model)
    with torch.no_grad():
        fast(torch.arange(8)[None])
    grouped = "unsupported: grouped (one product for several experts)"
    names = {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert {linear.fqn for linear in mixq.report(fast).skipped if linear.skip == grouped} == names
    swapped = mixq.report(mixq.quantize(model))
    assert {linear.fqn for linear in swapped.skipped if linear.skip == grouped} == names


def test_overflow_is_counted_and_advised_on() -> None:
    model = block()
    fast = compiled(model)
    x = rows(30)
    for column in range(20):
        x[column, column] = 10.0 + column
    fast(x)
    report = mixq.report(fast)
    up = report.quantized[0]
    assert up.overflow == 4
    assert len(up.outlier_columns) == up.capacity == 16
    (advice,) = report.advice
    assert advice == (
        "up_proj: columns were turned away 4 times, and the 16 largest are kept: raise capacity or threshold "
        "to change that, or leave this linear in 16 bit with ignore."
    )


def test_the_text_has_a_line_for_each_linear() -> None:
    model = block()
    fast = compiled(model, stats=statistics({"up_proj": {3: 9.0}}), ignore=["lm_head", "down_proj"])
    fast(rows())
    lines = str(mixq.report(fast)).splitlines()
    assert lines[0] == "1 of 3 linears quantized, 1 compiled graphs"
    assert "of originals kept beside them" in lines[1]
    assert any("up_proj" in line and "w8a8o16" in line and "1/16" in line for line in lines)
    assert any("down_proj" in line and "left alone: ignored" in line for line in lines)


def test_json_holds_everything() -> None:
    fast = compiled(block())
    fast(rows(columns=(3,)))
    report = mixq.report(fast)
    data = json.loads(json.dumps(report.to_json()))
    assert [entry["fqn"] for entry in data["linears"]] == [linear.fqn for linear in report.linears]
    assert data["linears"][0]["outlier_columns"] == [3]
    assert data["graphs"] == 1


class TestWarnings:
    def test_a_model_that_mixq_has_not_seen(self) -> None:
        with pytest.warns(UserWarning, match="mixq has seen no linear of this model: run a model compiled"):
            mixq.report(block())

    def test_a_compiled_model_that_has_not_run(self) -> None:
        with pytest.warns(UserWarning, match="run a model compiled with backend='mixq' once first"):
            mixq.report(compiled(block()))

    def test_nothing_quantized(self) -> None:
        fast = compiled(block(), ignore=["*"])
        with pytest.warns(UserWarning, match="quantized none of the 3 linears"):
            fast(rows())
        with pytest.warns(
            UserWarning, match="none of this model's linears is quantized: the report says why"
        ):
            mixq.report(fast)

    def test_a_quantized_model_is_silent(self) -> None:
        fast = compiled(block())
        fast(rows())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mixq.report(fast)


def test_reset_and_freeze_reach_swapped_modules() -> None:
    model = mixq.quantize(block())
    model(rows(columns=(3,)))
    mixq.freeze(model)
    model(rows(columns=(20,)))
    assert mixq.report(model).quantized[0].outlier_columns == (3,)
    mixq.reset(model)
    assert mixq.report(model).quantized[0].outlier_columns == ()
    model(rows(columns=(20,)))
    assert mixq.report(model).quantized[0].outlier_columns == (20,)


def test_old_compilations_are_forgotten() -> None:
    from mixq_compile.runtime import compilation
    from mixq_compile.runtime.options import MixqOptions

    before = list(compilation._COMPILATIONS)
    for _ in range(300):
        compilation.record(MixqOptions(), None, (), ())
    assert len(compilation._COMPILATIONS) == 256
    compilation._COMPILATIONS[:] = before
