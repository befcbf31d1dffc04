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
from mixq_compile.formats import TensorFormat
from mixq_compile.scheme import OutlierPolicy, QuantScheme
from mixq_compile.schemes import registry

NAME = "scheme_of_this_test"
FORMATS = [
    ("int8", "int4/64", None),
    ("int8", "int2", None),
    ("uint4/16", "mxint4/16", None),
    ("int8", "uint2", None),
    ("int8/16", "int8", OutlierPolicy()),
]
"""Of a weight and its activation, with an outlier policy: nothing quantizes such activations, or fetches the
outlier columns of such a weight."""


@pytest.fixture(autouse=True, params=FORMATS, ids=str)
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes a scheme of two formats known; gives what must be said of it."""
    weight, activation = (TensorFormat.parse(text) for text in request.param[:2])
    outliers = request.param[2]
    module = types.ModuleType(NAME)
    module.SCHEME = QuantScheme(NAME, "of this test", weight, activation, outliers)  # type: ignore[attr-defined]
    names = (*registry.scheme_names(), NAME)
    monkeypatch.setitem(sys.modules, f"mixq_compile.schemes.{NAME}", module)
    listing = types.SimpleNamespace(iter_modules=lambda path: [types.SimpleNamespace(name=n) for n in names])
    monkeypatch.setattr(registry, "pkgutil", listing)
    registry._module_names.cache_clear()
    yield f"beside {weight} weights" if outliers else str(activation)
    monkeypatch.undo()
    registry._module_names.cache_clear()


def skips(model: torch.nn.Module) -> set[str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = mixq.report(model)
    assert not report.quantized
    return {linear.skip for linear in report.linears if linear.fqn != "lm_head"}


def test_the_backend_leaves_the_linears_alone(reason: str) -> None:
    model = block()
    fast = torch.compile(model, backend="mixq", options={"scheme": NAME, "force": True, "lowering": "eager"})
    with pytest.warns(UserWarning, match=reason):
        result = fast(rows())
    assert torch.equal(result, model(rows()))
    assert all(reason in (skip or "") for skip in skips(fast))


def test_a_swap_leaves_the_linears_alone(reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        model = mixq.quantize(block(), NAME)
    assert torch.equal(model(rows()), block()(rows()))
    assert all(reason in (skip or "") for skip in skips(model))


def test_an_export_says_it_in_its_decisions(reason: str) -> None:
    _, history = mixq.compile(mixq.capture(block(), rows()), scheme=NAME, force=True)
    found = [decision.reason for decision in history.decisions("up_proj")]
    assert any(reason in each for each in found), found
