"""A scheme whose format no kernel computes with is refused, with the reason, wherever it is asked for."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from compiling import block, rows

import mixq_compile as mixq
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.scheme import QuantScheme
from mixq_compile.schemes import registry

NAME = "w4g16a8_of_this_test"
REASON = "not with int4/16"


@pytest.fixture(autouse=True)
def scheme_in_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType(NAME)
    module.SCHEME = QuantScheme(NAME, "groups of 16", TensorFormat.parse("int4/16"), INT8)  # type: ignore[attr-defined]
    names = (*registry.scheme_names(), NAME)
    monkeypatch.setitem(sys.modules, f"mixq_compile.schemes.{NAME}", module)
    listing = types.SimpleNamespace(iter_modules=lambda path: [types.SimpleNamespace(name=n) for n in names])
    monkeypatch.setattr(registry, "pkgutil", listing)
    registry.scheme_names.cache_clear()
    yield
    monkeypatch.undo()
    registry.scheme_names.cache_clear()


def skips(model: torch.nn.Module) -> set[str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = mixq.report(model)
    assert not report.quantized
    return {linear.skip for linear in report.linears if linear.fqn != "lm_head"}


def test_the_backend_leaves_the_linears_alone() -> None:
    model = block()
    fast = torch.compile(model, backend="mixq", options={"scheme": NAME, "force": True, "lowering": "eager"})
    with pytest.warns(UserWarning, match=REASON):
        result = fast(rows())
    assert torch.equal(result, model(rows()))
    assert all(REASON in (skip or "") for skip in skips(fast))


def test_a_swap_leaves_the_linears_alone() -> None:
    with pytest.warns(UserWarning, match=REASON):
        model = mixq.quantize(block(), NAME)
    assert torch.equal(model(rows()), block()(rows()))
    assert all(REASON in (skip or "") for skip in skips(model))


def test_an_export_says_it_in_its_decisions() -> None:
    _, history = mixq.compile(mixq.capture(block(), rows()), scheme=NAME, force=True)
    reasons = [decision.reason for decision in history.decisions("up_proj")]
    assert any(REASON in reason for reason in reasons)
