"""`auto8`: weights by error feedback, so that outlier columns come from the codes, by every way in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.calibration import CalibrationStats
from mixq_compile.errors import OptionError, StatisticsError
from mixq_compile.evaluation import relative_error
from mixq_compile.runtime.mixq_linear import MixqLinear

K, N = 96, 64


class Two(nn.Module):
    """Two linears, of which the second runs on request."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.first(x) + self.second(x) if both else self.first(x)


def inputs(seed: int, rows: int = 256) -> Tensor:
    """Channels that go together, some of them loud."""
    mixing = torch.randn(24, K, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 24, generator=generator) @ mixing + 0.2 * torch.randn(rows, K, generator=generator)
    return x * torch.ones(K).index_fill(0, torch.tensor([3, 40, 77]), 25.0)


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return mixq.calibrate(Two().eval(), [inputs(2), inputs(3)], kinds=("gram",), progress=False)


def error(model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        model(x)
        return relative_error(Two().eval()(x), model(x))


def test_it_is_more_accurate_than_rounding_to_nearest(stats: CalibrationStats) -> None:
    x = inputs(9)
    nearest = error(mixq.quantize(Two().eval()), x)
    feedback = error(mixq.quantize(Two().eval(), "auto8", stats=stats), x)
    assert feedback < 0.8 * nearest, f"{feedback:.5f} beside {nearest:.5f}"


def test_backend_and_swap_compute_the_same(stats: CalibrationStats) -> None:
    x = inputs(9)
    swapped = mixq.quantize(Two().eval(), "auto8", stats=stats)
    options = {"scheme": "auto8", "stats": stats, "force": True, "lowering": "eager"}
    compiled = torch.compile(Two().eval(), backend="mixq", options=options)
    with torch.no_grad():
        for _ in range(2):
            found, other = compiled(x), swapped(x)
    assert relative_error(found, other) < 1e-6
    assert {linear.outlier_weight_source for linear in mixq.report(compiled).quantized} == {"codes"}
    assert {linear.outlier_weight_source for linear in mixq.report(swapped).quantized} == {"codes"}


@pytest.mark.parametrize("miss", ["exact", "lazy", "per_call"])
def test_outlier_columns_are_those_of_the_codes(stats: CalibrationStats, miss: str) -> None:
    """An original column would be made up for by the others, for an error that it does not have."""
    model = mixq.quantize(Two().eval(), "auto8", stats=stats, miss=miss)
    model(inputs(9))
    linear = model.first
    assert isinstance(linear, MixqLinear)
    columns = linear.outlier_state().columns()
    if miss != "per_call":
        assert {3, 40, 77} <= set(columns)
        kept = linear.outlier_weight[:, : len(columns)]
        assert torch.equal(kept, linear.dequantized_weight()[:, columns])
    assert error(model, inputs(9)) < 0.01


def test_written_weights_are_solved_anew(stats: CalibrationStats) -> None:
    model, other = Two().eval(), Two().eval()
    options = {"scheme": "auto8", "stats": stats, "force": True, "lowering": "eager"}
    compiled = torch.compile(model, backend="mixq", options=options)
    x = inputs(9)
    with torch.no_grad():
        compiled(x)
        for each in (model, other):
            each.first.weight.mul_(-0.5)
        compiled(x)
        assert relative_error(other(x), compiled(x)) < 0.01


def test_what_it_lacks_is_said_before_any_work(stats: CalibrationStats) -> None:
    channels = mixq.calibrate(Two().eval(), [inputs(2)], progress=False)
    with pytest.raises(StatisticsError, match=r"pass stats=mixq_compile.calibrate\(model, batches, kinds="):
        mixq.quantize(Two().eval(), "auto8")
    with pytest.raises(StatisticsError, match="these stats hold channels: calibrate again"):
        mixq.quantize(Two().eval(), "auto8", stats=channels)
    model = Two().eval()
    with pytest.raises(OptionError, match="leave keep_originals out"):
        mixq.quantize(model, "auto8", stats=stats, keep_originals=True)
    assert not any(isinstance(module, MixqLinear) for module in model.modules())


def test_a_linear_that_never_ran_is_left_alone() -> None:
    model = Two().eval()
    with pytest.warns(UserWarning, match="never ran"):
        stats = mixq.calibrate(model, [(inputs(2), False)], kinds=("gram",), progress=False)
    compiled = torch.compile(
        copy.deepcopy(model),
        backend="mixq",
        options={"scheme": "auto8", "stats": stats, "force": True, "lowering": "eager"},
    )
    with torch.no_grad():
        compiled(inputs(9))
    (left,) = mixq.report(compiled).skipped
    assert left.fqn == "second"
    assert "never ran during calibration" in (left.skip or "")
