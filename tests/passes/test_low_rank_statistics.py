"""A low-rank part that weighs channels by their magnitudes: with statistics, and with an equalized input."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import StatisticsError
from mixq_compile.formats import INT4
from mixq_compile.pipeline import PassError
from mixq_compile.scheme import LowRank, QuantScheme
from mixq_compile.schemes import registry

NAME = "weighted_of_this_test"
EQUALIZED = (
    "strip-guards,canonicalize-linear,select-scheme{default=" + NAME + " force=true},equalize-inputs,"
    "rewrite-mixed-linear,select-kernels,prune-dead-weights,verify"
)


@pytest.fixture(autouse=True)
def scheme(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType(NAME)
    module.SCHEME = QuantScheme(  # type: ignore[attr-defined]
        NAME, "of this test", INT4, low_rank=LowRank(4, "activations")
    )
    names = (*registry.scheme_names(), NAME)
    monkeypatch.setitem(sys.modules, f"mixq_compile.schemes.{NAME}", module)
    listing = types.SimpleNamespace(iter_modules=lambda path: [types.SimpleNamespace(name=n) for n in names])
    monkeypatch.setattr(registry, "pkgutil", listing)
    registry._module_names.cache_clear()
    yield
    monkeypatch.undo()
    registry._module_names.cache_clear()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval().requires_grad_(False)


def inputs() -> Tensor:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 50  # a channel whose rounding errors weigh most
    return x


def error(found: Tensor) -> float:
    exact = model()(inputs())
    return float((found - exact).norm() / exact.norm())


def test_the_swap_and_the_backend_weigh_alike() -> None:
    stats = mixq.calibrate(model(), [inputs()])
    swapped = mixq.quantize(model(), NAME, stats=stats)(inputs())
    options = {"scheme": NAME, "stats": stats, "force": True, "lowering": "eager"}
    compiled = torch.compile(model(), backend="mixq", options=options)(inputs())
    torch.testing.assert_close(compiled, swapped, rtol=1e-5, atol=1e-5)
    weight = mixq.quantize(model(), NAME, stats=stats)[0]
    errors = (weight.dequantized_weight() - model()[0].weight).norm(dim=0)
    assert errors[5] < 0.2 * errors.mean(), "the heavy channel is not the one that is kept best"


def test_without_statistics_it_says_what_is_missing() -> None:
    with pytest.raises(StatisticsError, match=r"mean_magnitude.*calibrate"):
        mixq.quantize(model(), NAME)


def test_of_an_equalized_input_the_magnitudes_are_scaled_too() -> None:
    stats = mixq.calibrate(model(), [inputs()])
    found = {}
    for text in (EQUALIZED, EQUALIZED.replace("equalize-inputs,", "")):
        options = {"stats": stats, "lowering": "eager", "pipeline": text}
        found[text] = error(torch.compile(model(), backend="mixq", options=options)(inputs()))
    plain, equalized = found[EQUALIZED.replace("equalize-inputs,", "")], found[EQUALIZED]
    assert equalized < 1.5 * plain, found


def test_of_a_rotated_input_nothing_is_known() -> None:
    stats = mixq.calibrate(model(), [inputs()])
    text = EQUALIZED.replace("equalize-inputs", "rotate-inputs")
    fast = torch.compile(
        model(), backend="mixq", options={"stats": stats, "lowering": "eager", "pipeline": text}
    )
    with pytest.raises(Exception, match="which was rotated after calibration") as caught:
        fast(inputs())
    assert isinstance(caught.value, PassError) or "StatisticsError" in str(caught.value)


def test_the_statistics_of_one_linear_are_read_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hash is part of what a weight is known by: that of all linears would be made for each."""
    stats = mixq.calibrate(model(), [inputs()])
    whole, calls = type(stats).sha256, []
    monkeypatch.setattr(type(stats), "sha256", lambda self: calls.append(1) or whole(self))
    swapped = mixq.quantize(model(), NAME, stats=stats)
    assert len(mixq.report(swapped).quantized) > 1
    assert len(calls) <= 1, "all statistics were hashed for each linear"
