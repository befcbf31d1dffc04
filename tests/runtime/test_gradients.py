"""A gradient that is asked for through a quantized linear ends in an error in words, in every spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import FEATURES, rows
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mixq_compile as mixq
from mixq_compile.errors import MixqError


def swapped(trainable: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES))
    return mixq.quantize(model.requires_grad_(trainable).eval())


def _dual(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


SPELLINGS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "backward": lambda model, x: model(x).sum().backward(),
    "backward into the input": lambda model, x: model(x.requires_grad_()).sum().backward(),
    "backward of one linear": lambda model, x: model[0](x).sum().backward(),
    "checkpoint": lambda model, x: (
        checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    ),
    "func.grad": lambda model, x: torch.func.grad(lambda value: model(value).sum())(x),
    "func.vjp": lambda model, x: torch.func.vjp(model, x)[1](x),
    "func.jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "func.jacrev": lambda model, x: torch.func.jacrev(model)(x[0]),
    "functional.jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x),
    "forward-mode AD": _dual,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_says_that_there_is_none(spelling):
    with pytest.raises(MixqError, match="has no gradient"):
        SPELLINGS[spelling](swapped(), rows())


def test_a_result_is_part_of_autograd_as_it_was_before_the_swap():
    x = rows()
    assert swapped(trainable=True)(x).requires_grad
    assert not swapped(trainable=False)(x).requires_grad
    with torch.no_grad():
        assert not swapped(trainable=True)(x).requires_grad


def test_what_is_behind_the_quantized_linears_can_be_trained():
    model, head = swapped(trainable=False), nn.Linear(FEATURES, 4)
    head(model(rows())).sum().backward()
    assert head.weight.grad is not None
