"""`auto4`: 4-bit weights by error feedback, whose kept columns are solved for beside the codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_auto8 import K, Two, inputs

import mixq_compile as mixq
from mixq_compile.calibration import CalibrationStats
from mixq_compile.errors import OptionError
from mixq_compile.evaluation import relative_error
from mixq_compile.runtime.mixq_linear import MixqLinear


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return mixq.calibrate(Two().eval(), [inputs(2), inputs(3)], kinds=("gram",), progress=False)


def compiled(model: torch.nn.Module, stats: CalibrationStats, **options: Any) -> Any:
    chosen = {"scheme": "auto4", "stats": stats, "force": True, "lowering": "eager", **options}
    return torch.compile(model, backend="mixq", options=chosen)


def error(call: Any, rows: int = 256) -> float:
    x = inputs(9, rows)
    with torch.no_grad():
        return relative_error(Two().eval()(x), call(x))


def test_it_is_more_accurate_than_a_search_for_scales(stats: CalibrationStats) -> None:
    searched = error(mixq.quantize(Two().eval(), "w4a8o16", stats=stats, miss="static"))
    found = error(mixq.quantize(Two().eval(), "auto4", stats=stats))
    assert found < 0.7 * searched, f"{found:.4f} beside {searched:.4f}"


@pytest.mark.parametrize("rows", [1, 3, 256])
def test_backend_and_swap_compute_the_same_for_all_rows(stats: CalibrationStats, rows: int) -> None:
    """Few rows too: codes alone, without the kept columns beside them, would be another weight."""
    swapped, fast = mixq.quantize(Two().eval(), "auto4", stats=stats), compiled(Two().eval(), stats)
    x = inputs(9, rows)
    with torch.no_grad():
        assert relative_error(fast(x), swapped(x)) < 1e-6
    assert error(swapped, rows) < 0.1
    assert {each.outlier_weight_source for each in mixq.report(fast).quantized} == {"solved"}
    assert {each.outlier_weight_source for each in mixq.report(swapped).quantized} == {"solved"}


def test_kept_columns_are_not_the_originals(stats: CalibrationStats) -> None:
    model, original = mixq.quantize(Two().eval(), "auto4", stats=stats), Two().eval()
    linear = model.first
    assert isinstance(linear, MixqLinear)
    columns = linear.outlier_state().columns()
    assert {3, 40, 77} <= set(columns)
    held = linear.outlier_weight[:, : len(columns)]
    moved = relative_error(original.first.weight.detach()[:, columns], held)
    assert 0.001 < moved < 0.5, "they made up for nothing, or are of other columns"


def test_copies_and_saved_states_keep_them(stats: CalibrationStats) -> None:
    model = mixq.quantize(Two().eval(), "auto4", stats=stats)
    other = mixq.quantize(Two().eval(), "auto4", stats=stats)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    x = inputs(9)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        assert torch.equal(other(x), model(x))


def test_written_weights_are_solved_anew(stats: CalibrationStats) -> None:
    model, other = Two().eval(), Two().eval()
    fast = compiled(model, stats)
    x = inputs(9)
    with torch.no_grad():
        fast(x)
        before = error(fast)
        for each in (model, other):
            for linear in (each.first, each.second):
                linear.weight.mul_(-0.5)
        fast(x)
        assert relative_error(other(x), fast(x)) < 1.5 * before


@pytest.mark.parametrize("miss", ["exact", "lazy", "per_call"])
def test_columns_found_later_would_be_too_coarse(stats: CalibrationStats, miss: str) -> None:
    with pytest.raises(OptionError, match=r"auto4' keeps the columns .* not '|4-bit codes are too coarse"):
        mixq.quantize(Two().eval(), "auto4", stats=stats, miss=miss)
    with pytest.raises(Exception, match=r"auto4' keeps the columns"):
        compiled(Two().eval(), stats, miss=miss)(inputs(9))


def test_down_projections_take_eight_bits(stats: CalibrationStats) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up_proj, self.down_proj = torch.nn.Linear(K, 2 * K), torch.nn.Linear(2 * K, K)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.down_proj(self.up_proj(x).relu())
            return hidden

    model = Block().eval()
    found = mixq.calibrate(model, [inputs(2)], kinds=("gram",), progress=False)
    swapped = mixq.quantize(model, "auto4", stats=found)
    schemes = {each.fqn: each.scheme for each in mixq.report(swapped).quantized}
    assert schemes == {"up_proj": "auto4", "down_proj": "auto8"}
