"""A scheme that exists nowhere is one short file, and every route computes what a float64 simulation says."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from compiling import block, rows
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.schemes import registry

NAME = "w4g64a8_rank8_of_this_test"
SCHEME = f'''
"""4-bit weights in groups of 64 with zero points, 8-bit activations, and a correction of rank 8."""
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.scheme import LowRank, QuantScheme

SCHEME = QuantScheme(
    name="{NAME}",
    summary="uint4 weights in groups of 64, int8 activations, rank 8",
    weight=TensorFormat.parse("uint4/64"),
    activation=INT8,
    low_rank=LowRank(8),
)
'''
assert len(SCHEME.strip().splitlines()) <= 15


@pytest.fixture(autouse=True)
def scheme(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType(NAME)
    exec(SCHEME, vars(module))
    names = (*registry.scheme_names(), NAME)
    monkeypatch.setitem(sys.modules, f"mixq_compile.schemes.{NAME}", module)
    listing = types.SimpleNamespace(iter_modules=lambda path: [types.SimpleNamespace(name=n) for n in names])
    monkeypatch.setattr(registry, "pkgutil", listing)
    registry._module_names.cache_clear()
    yield
    monkeypatch.undo()
    registry._module_names.cache_clear()


def simulated_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """The scheme in float64, written out: no function of the package."""
    weight, values = linear.weight.detach().double(), x.double()
    out_features, in_features = weight.shape
    rounded = torch.empty_like(weight)
    for start in range(0, in_features, 64):
        group = weight[:, start : start + 64]
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        step = ((high - low) / 15).float().double()
        zero = torch.round(-low / step).clamp(0, 15)
        codes = torch.round(group / step + zero).clamp(0, 15)
        rounded[:, start : start + 64] = (codes - zero) * step
    left, values_of_error, right = torch.linalg.svd((weight - rounded).T)
    rank = min(8, out_features, in_features)
    correction = (left[:, :rank] * values_of_error[:rank]) @ right[:rank]  # [K, N]
    scale = values.abs().amax(-1, keepdim=True) / 127
    quantized = torch.round(values / scale).clamp(-127, 127) * scale
    return quantized @ rounded.T + values @ correction + linear.bias.detach().double()


def simulated(model: nn.Module, x: Tensor) -> Tensor:
    hidden = torch.relu(simulated_linear(model.up_proj, x))
    hidden = x.double() + simulated_linear(model.down_proj, hidden)
    return hidden @ model.lm_head.weight.detach().double().T


def by_the_backend(model: nn.Module, x: Tensor) -> Tensor:
    options = {"scheme": NAME, "force": True, "lowering": "eager"}
    return torch.compile(model, backend="mixq", options=options)(x)


def by_inductor(model: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(model, backend="mixq", options={"scheme": NAME, "force": True})(x)


def swapped(model: nn.Module, x: Tensor) -> Tensor:
    return mixq.quantize(model, NAME)(x)


def swapped_and_compiled(model: nn.Module, x: Tensor) -> Tensor:
    return torch.compile(mixq.quantize(model, NAME), backend="mixq")(x)


def exported(model: nn.Module, x: Tensor) -> Tensor:
    program, _ = mixq.compile(mixq.capture(model, x), scheme=NAME, force=True)
    return program.module()(x)


ROUTES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    each.__name__: each for each in (by_the_backend, by_inductor, swapped, swapped_and_compiled, exported)
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_equals_the_simulation(route: str) -> None:
    model, x = block(), rows(12)
    exact, expected = model(x), simulated(model, x)
    with torch.no_grad():
        found = ROUTES[route](model, x).double()
    error = (found - expected).norm() / expected.norm()
    assert error < 2e-6, f"{route} is {error:.1e} off the simulation"
    assert (expected - exact.double()).norm() / expected.norm() > 1e-3, "nothing was quantized"


def test_the_correction_takes_a_part_of_the_rounding_error() -> None:
    model = block()
    linear = model.up_proj
    weight = mixq.quantize(model, NAME).up_proj
    plain = weight.dequantized_weight() - (weight.left @ weight.right).T
    error = [(each - linear.weight).norm() for each in (weight.dequantized_weight(), plain)]
    assert error[0] < 0.9 * error[1]


def test_a_saved_state_comes_back() -> None:
    one, other = mixq.quantize(block(), NAME), block()
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0)
    mixq.quantize(other, NAME)
    x = rows(12)
    assert not torch.equal(other.up_proj(x), one.up_proj(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x))
