"""Fused producers in Triton: y is the model's within rounding, all else exactly that of quantizing y.

On the CPU in Triton's interpreter (`TRITON_INTERPRET=1 pytest <this file>`), on a GPU as compiled.
"""

from __future__ import annotations

import os

import pytest
import torch

from mixq_compile.ops import declarations as ops
from mixq_compile.ops.outlier_state import FROZEN, OutlierState
from mixq_compile.ops.prologues import activation_quantize, norm_quantize

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETING and not torch.cuda.is_available(),
        reason="runs with TRITON_INTERPRET=1 in its own process, or on an NVIDIA GPU",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]

DEVICE = "cpu" if INTERPRETING else "cuda"
PRODUCERS = ("rms", "layer", "silu", "gelu", "gelu_tanh", "silu alone")
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.1e-3, torch.bfloat16: 1.7e-2 if INTERPRETING else 9e-3}
"""One unit in the last place of each, relative; the interpreter truncates to bfloat16, in each rounding."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def produce(producer: str, x: torch.Tensor, state: OutlierState, kernel: str, miss: str, small_m: int = 0):  # type: ignore[no-untyped-def]
    """Runs one producer; the norms have large weights and functions large factors in columns 3 and 17."""
    columns, dtype = x.shape[-1], x.dtype
    x = x.to(DEVICE)
    tail = (*state.buffers(), *(() if producer not in ("rms", "layer") else (1e-6,)))
    if producer in ("rms", "layer"):
        weight = 1 + 0.1 * normal(columns, seed=1)
        weight[[3, 17]] = 30.0
        weight = weight.to(DEVICE, dtype)
        bias = (0.1 * normal(columns, seed=2)).to(DEVICE, dtype) if producer == "layer" else None
        return norm_quantize(x, weight, bias, *tail, producer, 8, miss, small_m, kernel)
    factor = None
    if not producer.endswith("alone"):
        wide = normal(*x.shape[:-1], 2 * columns, seed=3)
        wide[..., [3, 17]] *= 30
        factor = wide.to(DEVICE, dtype)[..., :columns]  # a part of a larger result
    return activation_quantize(x, factor, *tail, producer.split()[0], 8, miss, small_m, kernel)


def state_of(columns: int, known: tuple[int, ...] = ()) -> OutlierState:
    state = OutlierState.create(columns, 16, 6.0, DEVICE)
    state.preload(known)
    return state


def check(producer: str, x: torch.Tensor, miss: str = "exact", known: tuple[int, ...] = ()) -> None:
    columns = x.shape[-1]
    found_state, wanted_state, other = (state_of(columns, known) for _ in range(3))
    if miss == "frozen":
        found_state.counters[FROZEN] = wanted_state.counters[FROZEN] = 1
    y, *found = produce(producer, x, found_state, "tl", miss)
    wanted = ops.quantize_online(y, *wanted_state.buffers(), 8, miss, 0, "ref")
    for name, one, another in zip(("codes", "scale", "outliers", "count"), found, wanted, strict=True):
        assert torch.equal(one.double().nan_to_num(77), another.double().nan_to_num(77)), name
    for name, one, another in zip(
        ("index", "slots", "maxima", "counters", "threshold"), found_state.buffers(), wanted_state.buffers(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one, another), name
    expected = produce(producer, x, other, "ref", miss)[0]
    assert y.dtype == expected.dtype == x.dtype
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(y), finite)
    tolerance = {"rtol": TOLERANCE[x.dtype], "atol": max(TOLERANCE[x.dtype] / 8, 2e-6)}
    torch.testing.assert_close(y[finite].double(), expected[finite].double(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_codes_are_those_of_the_value(producer: str, dtype: torch.dtype) -> None:
    check(producer, normal(5, 171).to(dtype))


@pytest.mark.parametrize("miss", ["exact", "lazy", "frozen", "static", "per_call"])
@pytest.mark.parametrize("producer", ["rms", "silu"])
def test_every_policy(producer: str, miss: str) -> None:
    check(producer, normal(4, 64).to(torch.float16), miss, known=(3, 9))


@pytest.mark.parametrize("producer", PRODUCERS)
def test_rows_that_are_zero_or_not_finite(producer: str) -> None:
    x = normal(5, 48)
    x[1] = 0
    x[2, 7] = torch.nan
    x[3, 11] = torch.inf
    check(producer, x.to(torch.float16), known=(7,))


def test_three_dimensions_and_rows_of_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixq_compile.kernels.tl import quantization

    monkeypatch.setattr(quantization, "ELEMENTS_PER_THREAD", 1)
    for producer in PRODUCERS:
        check(producer, normal(2, 3, 171).to(torch.float16))


@pytest.mark.parametrize("producer", ["layer", "silu"])
def test_few_rows_are_produced_only(producer: str) -> None:
    state = state_of(64)
    x = normal(3, 64).to(torch.float16)
    y, codes, scale, outliers, _ = produce(producer, x, state, "tl", "exact", small_m=3)
    expected = produce(producer, x, state_of(64), "ref", "exact", small_m=3)[0]
    torch.testing.assert_close(y, expected, rtol=1.1e-3, atol=1e-4)
    assert (codes.shape, scale.shape, outliers.shape) == ((3, 64), (3,), (3, 16))
    assert state.columns() == []


def test_no_rows() -> None:
    y, codes, *_ = produce("rms", normal(0, 64), state_of(64), "tl", "exact")
    assert y.shape == codes.shape == (0, 64)
