"""Products as published schemes round them: against float64, and their errors on a model's own inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mixq_compile.area import LinearSize
from mixq_compile.benchmarking.layer_errors import MOST_DB, simulated_errors
from mixq_compile.benchmarking.simulated_schemes import SIMULATED, Problem
from mixq_compile.evaluation import sqnr

ROWS, K, N, GROUP, BLOCK = 24, 96, 40, 32, 16


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(in_features: int = K, rank: int = 8) -> Problem:
    x = numbers(ROWS, in_features)
    x[:, [3, 17]] *= 12
    size = LinearSize(N, in_features, rank=rank, group_size=GROUP)
    return Problem(x, numbers(N, in_features, seed=1), size, 6.0)


def blocks(values: Tensor, size: int) -> list[Tensor]:
    return list(values.double().split(size, dim=-1))


def signed(values: Tensor, bits: int, group: int | None = None) -> Tensor:
    found = []
    for block in blocks(values, group or values.shape[-1]):
        scale = block.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        found.append(torch.where(scale > 0, (block / scale).round() * scale, 0.0))
    return torch.cat(found, dim=-1)


def affine(values: Tensor, bits: int, group: int | None = None) -> Tensor:
    found = []
    for block in blocks(values, group or values.shape[-1]):
        low, high = block.amin(-1, keepdim=True).clamp_max(0), block.amax(-1, keepdim=True).clamp_min(0)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        found.append((((block / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale)
    return torch.cat(found, dim=-1)


def mxint(values: Tensor, bits: int) -> Tensor:
    found = []
    for block in blocks(values, BLOCK):
        step = 2.0 ** (block.abs().amax(-1, keepdim=True).log2().ceil() - (bits - 1))
        found.append((block / step).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) * step)
    return torch.cat(found, dim=-1)


def lqer(given: Problem, weight: Tensor, high) -> Tensor:  # type: ignore[no-untyped-def]
    reach = given.x.double().abs().mean(0)
    scale = (reach / (reach.min() * reach.max()).sqrt())[:, None]
    left, singular, right = torch.linalg.svd((given.w.double() - weight).T * scale, full_matrices=False)
    rank = given.size.rank
    a, b = high((left[:, :rank] / scale).T).T, high((singular[:rank, None] * right[:rank]).T).T
    x = high(given.x)
    return x @ weight.T + high(x @ a) @ b


def expected(scheme: str, given: Problem) -> Tensor:
    """The product in float64, each scheme written out."""
    x, w = given.x.double(), given.w.double()
    kept = x.abs().amax(0) >= 6.0
    if scheme.startswith("llm_int"):
        bits = int(scheme[-1])
        low = signed(torch.where(kept, 0, x), bits) @ signed(torch.where(kept, 0, w), bits).T
        return low + x[:, kept] @ w[:, kept].T
    if scheme in ("awq", "gptq"):
        return given.x.half().double() @ affine(w, 4, GROUP).T
    if scheme == "smoothquant":
        scale = (x.abs().amax(0) / w.abs().amax(0)).sqrt()
        return signed(x / scale, 8) @ signed(w * scale, 8).T
    if scheme in ("quik", "atom"):
        kept = torch.zeros(x.shape[1], dtype=torch.bool)
        kept[x.abs().amax(0).argsort(descending=True)[: 256 if scheme == "quik" else 128]] = True
        inside = [torch.where(kept, 0, values) for values in (x, w)]
        if scheme == "quik":
            return affine(inside[0], 4) @ signed(inside[1], 4).T + x[:, kept] @ w[:, kept].T
        high = [signed(torch.where(kept, values, 0), 8) for values in (x, w)]
        return signed(inside[0], 4, GROUP) @ signed(inside[1], 4, GROUP).T + high[0] @ high[1].T
    if scheme.startswith("lqer_int"):
        return lqer(given, signed(w, int(scheme[-1])), lambda values: signed(values, 16))
    bits = int(scheme[-1])
    return lqer(given, mxint(w, bits), lambda values: mxint(values, 8))


@pytest.mark.parametrize("scheme", [name for name in SIMULATED if name != "fp16"])
def test_a_scheme_is_what_its_formats_say(scheme: str) -> None:
    """As near as fp32 allows: a code beside its neighbour now and then, far below the scheme's own error."""
    given = problem(320)  # Wider than the 256 columns that QUIK keeps.
    product, exact = SIMULATED[scheme](given).double(), given.x.double() @ given.w.double().T
    wanted = expected(scheme, given)
    error = float((wanted - exact).square().mean())
    assert float((product - wanted).square().mean()) < 0.02 * error
    assert float((product - exact).square().mean()) == pytest.approx(error, rel=0.02)


def test_fp16_rounds_inputs_weights_and_the_result() -> None:
    given = problem()
    wanted = (given.x.half().double() @ given.w.half().double().T).half().double()
    torch.testing.assert_close(SIMULATED["fp16"](given).double(), wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", ["lqer_int4", "lqer_mxint2"])
def test_low_rank_brings_back_some_of_what_rounding_loses(scheme: str) -> None:
    given = problem()
    exact = given.x @ given.w.T
    found = [sqnr(exact, SIMULATED[scheme](problem(rank=rank))) for rank in (1, 8, 32)]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("scheme", SIMULATED)
def test_errors_do_not_depend_on_torchs_random_state(scheme: str) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(SIMULATED[scheme](problem(300)))
    assert torch.equal(*found)


class Twice(nn.Module):
    """A linear that is called twice, and one of another layout."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.linear, self.turned = nn.Linear(K, K), conv1d(N, K)
        with torch.no_grad():
            self.linear.weight.copy_(numbers(K, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.linear(self.linear(x)))


def simulated(model: nn.Module, x: Tensor, *schemes: str) -> dict[str, dict[str, float]]:
    sizes = {"linear": LinearSize(K, K), "turned": LinearSize(N, K), "absent": LinearSize(8, 8)}
    return simulated_errors(model, sizes, schemes, (x,), {}, 6.0)


def test_each_linear_is_measured_once_on_what_the_model_feeds_it() -> None:
    model, x = Twice(), numbers(ROWS, K)
    found = simulated(model, x, "awq", "llm_int8")
    assert set(found) == {"awq", "llm_int8"}
    assert {fqn for of in found.values() for fqn in of} == {"linear", "turned"}
    weight = model.linear.weight.detach()
    first = SIMULATED["awq"](Problem(x, weight, LinearSize(K, K), 6.0))
    assert found["awq"]["linear"] == sqnr(x @ weight.T, first)
    hidden = model.linear(model.linear(x)).detach()
    turned = Problem(hidden, model.turned.weight.detach().T, LinearSize(N, K), 6.0)
    assert found["awq"]["turned"] == sqnr(turned.x @ turned.w.T, SIMULATED["awq"](turned))
    assert not model.linear._forward_hooks


@pytest.mark.parametrize(("value", "decibels"), [(0.0, MOST_DB), (math.nan, -MOST_DB)])
def test_an_exact_or_broken_layer_has_an_error_that_json_can_hold(value: float, decibels: float) -> None:
    model = Twice()
    nn.init.constant_(model.turned.weight, value)
    assert simulated(model, numbers(ROWS, K), "fp16")["fp16"]["turned"] == decibels
