"""The kind `gram`: XᵀX of the finite rows of each linear's input."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from mixq_compile.calibration import calibrate, collecting_memory
from mixq_compile.calibration.collected.gram import GramAccumulator
from mixq_compile.errors import MixqError


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(rows: Tensor) -> Tensor:
    return (rows.double().mT @ rows.double()).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_product_of_all_rows_in_float64(dtype: torch.dtype) -> None:
    batches = [random_rows(5, 6, dtype=dtype), 9 * random_rows(2, 3, 6, dtype=dtype, seed=1)]
    entry = calibrate(nn.Sequential(nn.Linear(6, 4)).to(dtype), batches, kinds=("gram",))["0"]
    rows = torch.cat([batch.reshape(-1, 6) for batch in batches])
    assert (entry.gram.dtype, entry.gram.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(entry.gram, product(rows), rtol=1e-6, atol=0)
    torch.testing.assert_close(entry.gram.diagonal() / entry.rows, entry.mean_square)


def test_it_is_symmetric_bit_for_bit() -> None:
    gram = calibrate(nn.Sequential(nn.Linear(67, 4)), [random_rows(300, 67)], kinds=("gram",))["0"].gram
    assert torch.equal(gram, gram.mT)


def test_many_small_batches_lose_nothing() -> None:
    """A float32 sum would stop growing: 2²⁴ + 1 is 2²⁴ there."""
    accumulator = GramAccumulator(1, torch.device("cpu"))
    accumulator.add(torch.full((1, 1), 4096.0))
    for _ in range(50):
        accumulator.add(torch.ones(1, 1))
    assert accumulator.value().item() == 2**24 + 50


def test_more_rows_than_one_product_takes_are_all_counted() -> None:
    accumulator = GramAccumulator(2, torch.device("cpu"))
    accumulator.add(torch.ones(10_001, 2))
    assert torch.equal(accumulator.value(), torch.full((2, 2), 10_001.0))


def test_rows_that_are_not_finite_are_left_out() -> None:
    x = random_rows(5, 6)
    x[3, 2], x[0, 1] = float("nan"), float("-inf")
    with pytest.warns(UserWarning, match="NaN or infinity"):
        entry = calibrate(nn.Sequential(nn.Linear(6, 4)), [x], kinds=("gram",))["0"]
    torch.testing.assert_close(entry.gram, product(x[[1, 2, 4]]))


@pytest.mark.parametrize("mode", [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_the_model_s_own_modes_do_not_reach_the_sums(mode: torch.inference_mode | torch.autocast) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with mode:
                return self.inner(x * 1)

    batches = [random_rows(5, 6), random_rows(3, 6, seed=1)]
    gram = calibrate(Wrapped(), batches, kinds=("gram",))["inner"].gram
    torch.testing.assert_close(gram, product(torch.cat(batches)), rtol=1e-6, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_neither_tf32_nor_autocast_rounds_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    x = random_rows(5000, 64, dtype=dtype).cuda()
    model = nn.Sequential(nn.Linear(64, 4)).cuda().to(dtype)
    with torch.autocast("cuda", torch.bfloat16):
        gram = calibrate(model, [x], kinds=("gram",))["0"].gram
    torch.testing.assert_close(gram, product(x.cpu()), rtol=1e-6, atol=2e-3)


def test_activations_whose_squares_overflow_are_an_error() -> None:
    with pytest.raises(MixqError, match="the gram of 0 overflows float32"):
        calibrate(nn.Sequential(nn.Linear(6, 4)), [torch.full((2, 6), 1e30)], kinds=("gram",))


class TestMemory:
    model = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 100))
    needed = 12 * (100 * 100 + 10 * 10)

    def test_what_it_takes_is_checked_before_the_model_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collecting_memory, "free_bytes", lambda device: self.needed)
        ran = []
        self.model.register_forward_pre_hook(lambda module, args: ran.append(module))
        with pytest.raises(MixqError, match=r"gram of 2 linears needs up to 0\.00 GiB on cpu"):
            calibrate(self.model, [random_rows(2, 100)], kinds=("gram",))
        assert not ran

    def test_what_fits_runs_and_is_said(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(collecting_memory, "free_bytes", lambda device: self.needed * 1.1)
        with caplog.at_level(logging.INFO, logger="mixq_compile"):
            calibrate(self.model, [random_rows(2, 100)], kinds=("gram",))
        assert "collecting the gram of 2 linears takes up to 0.00 GiB on cpu" in caplog.text

    def test_channels_alone_ask_for_no_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collecting_memory, "free_bytes", lambda device: 0)
        assert calibrate(self.model, [random_rows(2, 100)]).kinds == ("channels",)
