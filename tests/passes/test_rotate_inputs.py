"""`rotate-inputs`: linears read `x · H` and hold `W · H`; the function stays, the parameters do too."""

from __future__ import annotations

import pytest
import torch
from captures import ROUTES, capture
from linear_models import captured, network, rows
from rewriting import CHOSEN, NAMED, decisions, reasons, run
from small_transformers import CLASSES, difference, rewritten, tokens, transformer
from torch import Tensor, nn

from mixq_compile.ir.annotations import Annotations
from mixq_compile.ops.operands import operand
from mixq_compile.weights.steps.rotate import Rotate

EXACT = 1e-5
aten = torch.ops.aten


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_function_of_a_model_is_preserved(kind: str, route: str) -> None:
    model = transformer(kind)
    before = {name: value.clone() for name, value in model.named_parameters()}
    graph, history = rewritten(model, f"{NAMED},rotate-inputs", route)
    told = decisions(history, "rotate-inputs")
    assert sum(each.verdict == "applied" for each in told) == (5 if kind == "bert" else 4)
    assert {each.reason.split(",")[0] for each in told if each.verdict == "applied"} == {
        "Hadamard of order 64", "Hadamard of order 96",
    }  # fmt: skip
    assert difference(graph, model) < EXACT
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), f"{name} was changed: others may read it"


def test_after_equalizing_and_folding_too() -> None:
    model = transformer("gpt2")
    graph, _ = rewritten(model, f"{NAMED},equalize-inputs,fold-input-scales,rotate-inputs", dynamic=True)
    assert difference(graph, model, tokens(5)) < EXACT


def test_linears_that_read_one_value_share_the_rotation() -> None:
    model = network()
    graph = captured(model, "export")
    history = run(graph, f"{CHOSEN},rotate-inputs")
    nodes = {Annotations(node).fqn: node for node in graph.walk(aten.linear.default)}
    assert operand(nodes["attn.q_proj"], "input") is operand(nodes["attn.k_proj"], "input")
    assert reasons(history, "rotate-inputs")["attn.q_proj"] == "noted: reads what attn.k_proj reads"
    derived = graph.tensor(operand(nodes["attn.q_proj"], "weight"))
    expected = model.attn.q_proj.weight.double() @ Rotate().matrix(64)
    torch.testing.assert_close(derived, expected.float())


class Two(nn.Module):
    """Two linears in a row, and perhaps something that reads what is between them."""

    def __init__(self, middle: int = 24, bias: bool = True, *, read_between: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, middle, bias=bias), nn.Linear(middle, 64)
        self.read_between = read_between

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x)
        result = self.second(between)
        return result + between.sum() if self.read_between else result


def rotated(model: nn.Module, options: str = "") -> tuple[str, str, float, int]:
    """Verdict and reason for `second`, the graph's relative error, and its products beside the linears."""
    torch.manual_seed(0)
    model = model.eval().requires_grad_(False)
    x = rows(5)
    graph = capture(model, x, route="export")
    history = run(graph, f"{CHOSEN},rotate-inputs{options}")
    (decision,) = (each for each in decisions(history, "rotate-inputs") if each.fqn == "second")
    got, expected = graph.module(x), model(x)
    products = len(list(graph.walk(aten.matmul.default)))
    return decision.verdict, decision.reason, float((got - expected).norm() / expected.norm()), products


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_before_takes_the_rotation_in_its_rows(bias: bool) -> None:
    verdict, reason, error, products = rotated(Two(bias=bias))
    assert (verdict, reason) == ("applied", "Hadamard of order 24, in the rows of first")
    assert products == 2, "only the first linear's input is rotated while running"
    assert error < EXACT


@pytest.mark.parametrize("how", ["something else reads the value", "fold=false"])
def test_else_the_value_is_rotated_while_running(how: str) -> None:
    reads = how.startswith("something")
    verdict, reason, error, products = rotated(Two(read_between=reads), "" if reads else "{fold=false}")
    assert (verdict, reason) == ("applied", "Hadamard of order 24, while running")
    assert products == 4
    assert error < EXACT


def test_an_odd_number_of_channels_is_left_alone() -> None:
    verdict, reason, error, _ = rotated(Two(middle=25))
    assert verdict == "skipped"
    # An odd number has no kernel's width either; the first reason is the selection's.
    assert "25" in reason or "none of the linears" in reason
    assert error < EXACT


def test_products_of_the_rotation_are_not_taken_for_linears() -> None:
    graph = captured(network(), "export")
    run(graph, f"{CHOSEN},rotate-inputs")
    before = len(list(graph.walk(aten.linear.default)))
    run(graph, "canonicalize-linear")
    assert len(list(graph.walk(aten.linear.default))) == before


def test_codes_are_those_of_the_rotated_weight() -> None:
    """One huge channel ruins the scale of every row; rotated, its magnitude is spread."""
    model = network().requires_grad_(False)
    x = rows(32, columns=(3,)) * torch.where(torch.arange(64) == 3, 20.0, 1.0)
    errors = {}
    for name, text in (("plain", ""), ("rotated", ",rotate-inputs")):
        graph = captured(model, "export", x)
        chosen = f"{NAMED},select-scheme{{default=w8a8 force=true}}"
        run(graph, f"{chosen}{text},rewrite-mixed-linear{{kernel=ref}},share-quantize,fuse-epilogue,verify")
        got, expected = graph.module(x), model(x)
        errors[name] = float((got - expected).norm() / expected.norm())
    assert errors["rotated"] < errors["plain"] / 2, errors
