"""Regions that run a graph of their own: inlined where they mean nothing, else their linears are reported."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import pytest
import torch
from compiling import FEATURES, compiled, rows
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import mixq_compile as mixq
from mixq_compile.evaluation import sqnr
from mixq_compile.inspection.layers import layers_of
from mixq_compile.passes.canonicalize_linear import MIXED_TYPES

LEAST_SQNR = 35.0


class Model(nn.Module):
    """A linear, a region that holds another, and a linear."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def _under(context: Callable[[], object]) -> Callable[[nn.Module, Tensor], Tensor]:
    def between(model: nn.Module, x: Tensor) -> Tensor:
        with context():
            return torch.relu(model.inner(x)).to(x.dtype)

    return between


def _checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda value: torch.relu(model.inner(value)), x, use_reentrant=False)


def _checkpoint_in_no_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return _checkpoint(model, x) + 1


@torch.compiler.nested_compile_region
def _region(linear: nn.Module, value: Tensor) -> Tensor:
    return torch.relu(linear(value))


def _compiled_once(model: nn.Module, x: Tensor) -> Tensor:
    return _region(model.inner, _region(model.inner, x))


def _condition(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda value: model.inner(value), lambda value: value * 2, (x,))


def _loop(model: nn.Module, x: Tensor) -> Tensor:
    def again(count: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, torch.relu(model.inner(value))

    return while_loop(lambda count, value: count < 2, again, (torch.tensor(0), x))[1]


def _autocast(enabled: bool) -> Callable[[], object]:
    return lambda: torch.autocast("cpu", torch.bfloat16, enabled=enabled)


WITHOUT_MEANING = {
    "no_grad": _under(torch.no_grad),
    "enable_grad": _under(torch.enable_grad),
    "autocast that is off": _under(_autocast(False)),
    "checkpoint": _checkpoint,
    "checkpoint in no_grad": _checkpoint_in_no_grad,
    "nested_compile_region": _compiled_once,
}
WITH_MEANING = {
    "autocast": (_under(_autocast(True)), MIXED_TYPES),
    "cond": (_condition, "it runs inside cond, whose graph no pass rewrites"),
    "while_loop": (_loop, "it runs inside while_loop, whose graph no pass rewrites"),
}


def model_of(between: Callable[[nn.Module, Tensor], Tensor]) -> Model:
    torch.manual_seed(0)
    return Model(between).eval().requires_grad_(False)


def exported(model: nn.Module, x: Tensor, gradients: bool) -> torch.export.ExportedProgram:
    """As users export: with gradients on, the regions stand in the program."""
    with torch.set_grad_enabled(gradients):
        return torch.export.export(model, (x,), strict=False)


def reasons(history: object) -> dict[str, str | None]:
    return {layer.fqn: layer.skip for layer in layers_of(history)}


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@pytest.mark.parametrize("between", WITHOUT_MEANING.values(), ids=WITHOUT_MEANING)
def test_the_backend_quantizes_what_is_in_a_region_without_meaning(between, lowering):
    model, x = model_of(between), rows()
    fast = compiled(model, lowering=lowering)
    assert sqnr(model(x), fast(x)) >= LEAST_SQNR
    assert sorted(linear.fqn for linear in mixq.report(fast).quantized) == ["first", "inner", "last"]


# torch.export tells of no call inside nested_compile_region which module it belongs to.
EXPORTED = [name for name in WITHOUT_MEANING if name != "nested_compile_region"]


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients on", "no_grad"])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_is_quantized_there_too(name, gradients):
    model, x = model_of(WITHOUT_MEANING[name]), rows()
    rewritten, history = mixq.compile(exported(model, x, gradients), "aot", force=True)
    assert sqnr(model(x), rewritten.module()(x)) >= LEAST_SQNR
    assert reasons(history) == {"first": None, "inner": None, "last": None}


@pytest.mark.parametrize(("between", "reason"), WITH_MEANING.values(), ids=WITH_MEANING)
def test_a_linear_in_a_region_that_stays_is_reported_with_the_reason(between, reason):
    model, x = model_of(between), rows()
    fast = compiled(model)
    assert sqnr(model(x), fast(x)) >= LEAST_SQNR
    report = mixq.report(fast)
    assert [linear.fqn for linear in report.quantized] == ["first", "last"]
    (left,) = report.skipped
    assert (left.fqn, left.skip) == ("inner", reason)
    assert (left.out_features, left.in_features) == (FEATURES, FEATURES)


@pytest.mark.parametrize(("between", "reason"), WITH_MEANING.values(), ids=WITH_MEANING)
def test_the_history_of_an_exported_program_names_it_too(between, reason):
    model, x = model_of(between), rows()
    _, history = mixq.compile(exported(model, x, True), "aot", force=True)
    assert reasons(history) == {"first": None, "inner": reason, "last": None}
    inner = next(layer for layer in layers_of(history) if layer.fqn == "inner")
    assert (inner.out_features, inner.in_features) == (FEATURES, FEATURES)


def test_autocast_of_a_model_that_is_cast_already_means_nothing():
    model = model_of(_under(_autocast(True))).bfloat16()
    x = rows().bfloat16()
    _, history = mixq.compile(exported(model, x, True), "aot", force=True)
    assert reasons(history) == {"first": None, "inner": None, "last": None}


def test_a_forward_decorated_with_no_grad_is_quantized_and_saved():
    class Decorated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    torch.manual_seed(0)
    model, x = Decorated().eval(), rows()
    rewritten, history = mixq.compile(torch.export.export(model, (x,), strict=False), "aot", force=True)
    assert reasons(history) == {"linear": None}
    file = io.BytesIO()
    torch.export.save(rewritten, file)
    file.seek(0)
    assert sqnr(model(x), torch.export.load(file).module()(x)) >= LEAST_SQNR


class OnlyInside(nn.Module):
    """A model whose one linear is in a region that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return _condition(self, x)


NOTHING = "inside cond"


def test_each_entrance_warns_where_nothing_was_quantized():
    model, x = OnlyInside().eval().requires_grad_(False), rows()
    with pytest.warns(UserWarning, match=NOTHING):
        compiled(model)(x)
    with pytest.warns(UserWarning, match=NOTHING):
        mixq.compile(mixq.capture(model, (x,)), "aot", force=True)
    with pytest.warns(UserWarning, match="it holds no linear"):
        mixq.compile(mixq.capture(nn.ReLU(), (x,)), "aot")
    with pytest.warns(UserWarning, match="the model has no linears"):
        mixq.quantize(nn.Sequential(nn.ReLU()))


def test_no_entrance_warns_where_something_was():
    model, x = model_of(_condition), rows()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mixq quantized no")
        compiled(model)(x)
        mixq.compile(mixq.capture(model, (x,)), "aot", force=True)
        mixq.compile(mixq.capture(mixq.quantize(model_of(_checkpoint)), (x,)))
