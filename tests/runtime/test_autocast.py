"""A swapped linear under autocast: its result has the dtype that the linear's had."""

from __future__ import annotations

import pytest
import torch
from compiling import FEATURES, compiled, rows
from torch import nn

import mixq_compile as mixq
from mixq_compile.evaluation import sqnr

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linears(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A linear, and the same swapped."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(nn.Sequential(nn.Linear(FEATURES, FEATURES)).to(dtype).eval())
    return made[0], mixq.quantize(made[1])


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_value_are_those_of_the_linear(dtype, given, lower):
    plain, swapped = linears(dtype)
    x = rows().to(given)
    with torch.no_grad(), torch.autocast("cpu", lower):
        expected, result = plain(x), swapped(x)
    assert result.dtype == expected.dtype == lower
    assert sqnr(expected.float(), result.float()) > 30


@pytest.mark.parametrize("backend", ["mixq", "aot_eager"])
def test_so_are_they_in_a_compiled_model(backend):
    plain, swapped = linears(torch.float32)
    fast = (
        compiled(swapped, lowering="aot_eager")
        if backend == "mixq"
        else torch.compile(swapped, backend=backend)
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, result = plain(rows()), fast(rows())
    assert result.dtype == expected.dtype == torch.bfloat16
    assert sqnr(expected.float(), result.float()) > 30


def test_autocast_that_is_off_casts_nothing():
    _, swapped = linears(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert swapped(rows()).dtype == torch.float32
