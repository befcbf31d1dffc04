"""Transforms of functorch in a model: what is between begin and end stays, the rest is quantized."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiling import FEATURES, compiled, rows
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import mixq_compile as mixq
from mixq_compile.errors import OperandError
from mixq_compile.evaluation import sqnr
from mixq_compile.passes.canonicalize_linear import TRANSFORMED

LEAST_SQNR = 35.0


class Model(nn.Module):
    """A linear, something in between that may use another linear, and a linear."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def model_of(between: Callable[[nn.Module, Tensor], Tensor]) -> Model:
    torch.manual_seed(0)
    return Model(between).eval().requires_grad_(False)


def _gradient(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda value: torch.sin(value).sum())(x)


def _tangent(model: nn.Module, x: Tensor) -> Tensor:
    value, tangent = torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))
    return value + tangent


def _dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(torch.sin(forward_ad.make_dual(x, torch.ones_like(x))))
    return value + tangent


def _pullback(model: nn.Module, x: Tensor) -> Tensor:
    value, pull = torch.func.vjp(torch.sin, x)
    return pull(torch.ones_like(value))[0]


def _scan(model: nn.Module, x: Tensor) -> Tensor:
    return associative_scan(lambda a, b: a + b, x, dim=0, combine_mode="generic")


WITHOUT_LINEARS = {
    "vmap": lambda model, x: torch.vmap(torch.relu)(x),
    "vmap of vmap": lambda model, x: torch.vmap(torch.vmap(torch.sin))(x),
    "vmap in chunks": lambda model, x: torch.vmap(torch.relu, chunk_size=2)(x),
    "grad": _gradient,
    "jvp": _tangent,
    "forward-mode AD": _dual,
    "vjp": _pullback,
    "jacobian": lambda model, x: torch.func.jacrev(torch.sin)(x[0]),
    "associative scan": _scan,
}
WITH_LINEARS = {
    "vmap of a linear": lambda model, x: torch.vmap(model.inner)(x),
    "vmap of a product": lambda model, x: torch.vmap(lambda row: row @ model.inner.weight.t())(x),
    "grad through a linear": lambda model, x: torch.func.grad(
        lambda value: torch.sin(model.inner(value)).sum()
    )(x),
}
UNCAPTURED = ("grad", "vjp", "jacobian", "grad through a linear")
"""torch.export itself cannot export these twice."""


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients on", "no_grad"])
@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@pytest.mark.parametrize("between", WITHOUT_LINEARS.values(), ids=WITHOUT_LINEARS)
def test_the_linears_around_a_transform_are_quantized_by_the_backend(between, lowering, gradients):
    model, x = model_of(between), rows()
    fast = compiled(model, lowering=lowering)
    with torch.set_grad_enabled(gradients):
        assert sqnr(model(x), fast(x)) >= LEAST_SQNR
    assert [linear.fqn for linear in mixq.report(fast).quantized] == ["first", "last"]


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@pytest.mark.parametrize("between", WITH_LINEARS.values(), ids=WITH_LINEARS)
def test_a_linear_inside_a_transform_stays_and_the_report_says_why(between, lowering):
    model, x = model_of(between), rows()
    fast = compiled(model, lowering=lowering)
    assert sqnr(model(x), fast(x)) >= LEAST_SQNR
    report = mixq.report(fast)
    assert [linear.fqn for linear in report.quantized] == ["first", "last"]
    assert {linear.fqn: linear.skip for linear in report.skipped} == {"inner": TRANSFORMED}


@pytest.mark.parametrize(
    "name", [name for name in {**WITHOUT_LINEARS, **WITH_LINEARS} if name not in UNCAPTURED]
)
def test_a_model_with_a_transform_is_exported(name):
    model, x = model_of({**WITHOUT_LINEARS, **WITH_LINEARS}[name]), rows()
    rewritten, _ = mixq.compile(mixq.capture(model, (x,)), "aot", force=True)
    assert sqnr(model(x), rewritten.module()(x)) >= LEAST_SQNR
    assert "first.weight" not in rewritten.state_dict


def test_calls_that_begin_and_end_a_mode_are_kept():
    """`sdpa_kernel` chooses the arithmetic of attention: without its calls the model would ignore it."""

    def attention(model: nn.Module, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None])[
                0, 0
            ]

    kept: list[str] = []

    def look(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        from mixq_compile.ir.graph import CapturedGraph

        def modes() -> list[str]:
            calls = (node for node in module.graph.nodes if node.op == "call_function")
            return [node.name for node in calls if "sdpa_kernel" in node.name]

        before = modes()
        CapturedGraph.from_dynamo(module, inputs).eliminate_dead_code()
        assert before == modes() != []
        kept.extend(modes())
        return module.forward

    torch.compile(model_of(attention), backend=look, fullgraph=True)(rows())
    assert len(kept) == 2


@pytest.mark.parametrize("in_dim", [0, 1])
def test_a_swapped_linear_has_a_rule_for_vmap(in_dim):
    model = model_of(lambda model, x: model.inner(x))
    x = rows(6).reshape(2, 3, FEATURES)
    swapped = mixq.quantize(model)
    expected = swapped.inner(x)
    mapped = torch.vmap(swapped.inner, in_dims=in_dim, out_dims=in_dim)(x)
    assert torch.equal(mapped, expected)


@pytest.mark.parametrize("entrance", ["backend", "export"])
def test_a_swapped_linear_inside_vmap_is_compiled(entrance):
    model, x = model_of(WITH_LINEARS["vmap of a linear"]), rows()
    reference = model(x)
    swapped = mixq.quantize(model)
    if entrance == "backend":
        made = compiled(swapped)
    else:
        made = mixq.compile(mixq.capture(swapped, (x,)))[0].module()
    assert sqnr(reference, made(x)) >= LEAST_SQNR


def test_a_mask_of_rows_is_mapped_beside_its_rows():
    swapped = mixq.quantize(model_of(lambda model, x: model.inner(x)))
    x = rows(6, columns=(3,), size=40.0).reshape(2, 3, FEATURES)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    torch.vmap(swapped.inner)(x, mask)
    assert swapped.inner.outlier_state().columns() == []
    torch.vmap(swapped.inner)(x, ~mask)
    assert swapped.inner.outlier_state().columns() == [3]


def test_vmap_over_the_state_of_a_swapped_linear_is_refused_in_words():
    swapped = mixq.quantize(model_of(lambda model, x: model.inner(x))).inner
    parameters, buffers = torch.func.stack_module_state([swapped, swapped])
    x = rows()
    with pytest.raises(OperandError, match="Map over its inputs alone"):
        torch.vmap(lambda values: torch.func.functional_call(swapped, values, (x,)))(
            {**parameters, **buffers}
        )
