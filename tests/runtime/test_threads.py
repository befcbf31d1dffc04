"""Several threads call one quantized model: each result is as exact as if the thread had been alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import mixq_compile as mixq

ROWS, INPUTS, OUTPUTS = 64, 256, 64
ROUNDING = 1.05
"""How much a sum in another order may add to a float32 error."""
CHANCE = 1.3
"""How much the error of 64 numbers varies (a tenth either way) where linears before it round otherwise."""


@dataclass(frozen=True)
class Case:
    """An input with an outlier in one column, what the linears give in float64, and the error allowed."""

    x: Tensor
    exact: Tensor
    allowed: float


def float64(model: nn.Module, x: Tensor) -> Tensor:
    value = x.double()
    for layer in model:
        value = (
            torch.nn.functional.linear(value, layer.weight.double(), layer.bias.double())
            if isinstance(layer, nn.Linear)
            else layer(value)
        )
    return value


def relative(result: Tensor, exact: Tensor) -> float:
    return float((result - exact).norm() / exact.norm())


def linears(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    inner = [layer for _ in range(depth - 1) for layer in (nn.Linear(INPUTS, INPUTS), nn.ReLU())]
    return nn.Sequential(*inner, nn.Linear(INPUTS, OUTPUTS)).eval().requires_grad_(False)


def cases(model: nn.Module) -> list[Case]:
    """An outlier column apart in each, so that each call finds a new one or throws one out.

    No outlier scheme is worse than int8 with none of its columns kept, whose error is thus the bound.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = mixq.quantize(linears(sum(isinstance(layer, nn.Linear) for layer in model)), "w8a8")
    factor = ROUNDING if len(model) == 1 else CHANCE
    made = []
    for number in range(48):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(ROWS, INPUTS, generator=generator).clamp_(-4, 4)
        x[number % ROWS, (5 * number) % INPUTS] = 60.0
        exact = float64(model, x)
        made.append(Case(x, exact, factor * relative(plain(x), exact)))
    return made


def errors_beyond(
    call: Callable[[Tensor], Tensor], given: list[Case], threads: int, calls: int
) -> list[tuple[float, float]]:
    """The error and the allowed one of each call that is worse than allowed; raises what a thread raises."""
    beyond: list[tuple[float, float]] = []
    raised: list[BaseException] = []

    def work(first: int) -> None:
        try:
            with torch.no_grad():
                for number in range(first, calls, threads):
                    case = given[(number * 7) % len(given)]
                    error = relative(call(case.x), case.exact)
                    if not error <= case.allowed:
                        beyond.append((error, case.allowed))
        except BaseException as error:
            raised.append(error)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if raised:
        raise raised[0]
    return beyond


def prepared(route: str, model: nn.Module, miss: str, capacity: int) -> Callable[[Tensor], Tensor]:
    if route == "modules":
        return mixq.quantize(model, miss=miss, capacity=capacity)
    lowering = "inductor" if route == "inductor" else "eager"
    options = {"force": True, "miss": miss, "capacity": capacity, "lowering": lowering}
    return torch.compile(model, backend="mixq", options=options)


def check(route: str, miss: str, capacity: int, threads: int, calls: int, depth: int = 1) -> None:
    original = linears(depth)
    given = cases(original)
    call = prepared(route, linears(depth), miss, capacity)
    call(given[0].x)
    beyond = errors_beyond(call, given, threads, calls)
    worst = max(beyond, default=(0.0, 0.0))
    assert not beyond, (
        f"{len(beyond)} of {calls} calls on {threads} threads are worse than int8 without outlier columns: "
        f"{worst[0]:.3f} where {worst[1]:.3f} is allowed"
    )


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("miss", ["exact", "per_call", "lazy"])
@pytest.mark.parametrize("route", ["modules", "graph", "inductor"])
def test_every_call_is_within_the_schemes_error(route: str, miss: str, threads: int) -> None:
    # 16 slots for 48 columns: columns are thrown out all the time.
    check(route, miss, 16, threads, 2000 if miss == "exact" else 300)


@pytest.mark.parametrize("route", ["modules", "graph"])
def test_states_with_room_for_all_columns(route: str) -> None:
    check(route, "exact", 64, 4, 600)


@pytest.mark.parametrize("route", ["modules", "inductor"])
def test_linears_one_after_the_other(route: str) -> None:
    check(route, "exact", 16, 3, 300, depth=3)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("miss", ["exact", "per_call"])
@pytest.mark.parametrize("route", ["modules", "graph", "inductor"])
def test_twenty_thousand_calls(route: str, miss: str, threads: int) -> None:
    check(route, miss, 16, threads, 20_000)


def test_what_threads_learned_joins_the_state() -> None:
    model = mixq.quantize(linears(1), capacity=64)
    given = cases(linears(1))
    errors_beyond(model, given, threads=4, calls=400)
    planted = {int(case.x.abs().amax(dim=0).argmax()) for case in given}
    (linear,) = mixq.report(model).linears
    assert set(linear.outlier_columns) == planted, "a column found by a thread that was not alone is lost"
    assert linear.overflow == 0


def test_a_weight_written_between_calls_of_other_threads() -> None:
    model = linears(1)
    fast = torch.compile(model, backend="mixq", options={"force": True, "lowering": "eager"})
    given = cases(model)
    fast(given[0].x)
    stop = threading.Event()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                fast(given[1].x)
        except BaseException as error:
            raised.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for step in range(20):
            model[0].weight.mul_(-1.0)
            result = fast(given[step].x)
            error = relative(result, float64(model, given[step].x))
            assert error <= given[step].allowed, f"step {step}: {error:.3f}, packed while others ran"
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert not raised


def test_threads_that_reset_and_freeze_meanwhile() -> None:
    model = mixq.quantize(linears(1))
    given = cases(linears(1))
    stop = threading.Event()

    def control() -> None:
        while not stop.is_set():
            mixq.reset(model)

    controller = threading.Thread(target=control)
    controller.start()
    try:
        beyond = errors_beyond(model, given, threads=2, calls=400)
    finally:
        stop.set()
        controller.join()
    assert not beyond, f"resetting while others call gives {max(beyond)}"
