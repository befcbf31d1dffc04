"""Torch's default dtype and default device belong to the caller: they change no bit of what is computed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import FEATURES, block, compiled, rows
from other_defaults import DEFAULTS, assert_unchanged, default
from tiny_llama import ids, logits, tiny_llama
from torch import Tensor, nn
from uncalibrated import UNCALIBRATED

import mixq_compile as mixq
from mixq_compile import MixqLinear
from mixq_compile.benchmarking import planted
from mixq_compile.kernels.cpu import availability, measured
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.schemes.registry import get_scheme

LINEAR = nn.Linear(FEATURES, 48).requires_grad_(False)
FEW, MANY = rows(5, columns=(3,)), rows(60, columns=(3, 20))
"""The CPU's weight-only product streams the codes for few rows, and expands the weight for many."""


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("scheme", UNCALIBRATED)
def test_a_quantized_linear(name: str, scheme: str) -> None:
    def run() -> Any:
        module = MixqLinear.from_linear(LINEAR, get_scheme(scheme), columns=[3], column_max=[12.3456789])
        return [module(FEW), module(MANY), module(MANY)], dict(module.named_buffers())

    assert_unchanged(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_empty_quantized_linear(name: str) -> None:
    """What transformers makes while `from_pretrained(dtype=…)` has set the default dtype."""
    assert_unchanged(
        name,
        lambda: dict(
            MixqLinear(FEATURES, 48, get_scheme("w8a8o16"), bias=True, dtype=torch.bfloat16).named_buffers()
        ),
    )


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("scheme", UNCALIBRATED)
def test_the_codes_of_a_weight(name: str, scheme: str) -> None:
    assert_unchanged(name, lambda: quantize_weight(LINEAR.weight, get_scheme(scheme).recipe))


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_state_that_starts_with_calibrated_columns(name: str) -> None:
    def run() -> Any:
        state = OutlierState.create(64, 16, 6.1, "cpu")
        state.preload([3, 9], [7.123456, 8.7654321])
        return state.buffers()

    assert_unchanged(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("scheme", UNCALIBRATED)
def test_a_compiled_model(name: str, scheme: str) -> None:
    original = block()

    def run() -> Any:
        torch._dynamo.reset()
        model = compiled(copy.deepcopy(original), scheme=scheme, kernel="auto")
        return model(FEW), model(MANY)

    assert_unchanged(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("scheme", ["w4a8o16", "auto8"])
def test_quantize_and_calibrate(name: str, scheme: str) -> None:
    original = block()

    def run() -> Any:
        model = copy.deepcopy(original)
        stats = mixq.calibrate(model, [MANY], kinds=("gram",))
        entries = [vars(stats.linears[fqn]) for fqn in sorted(stats.linears)]
        mixq.quantize(model, scheme=scheme, stats=stats, miss="static", force=True)
        return entries, model(MANY), dict(model.named_buffers())

    assert_unchanged(name, run)


@pytest.mark.parametrize("name", ["bfloat16", "float64", "device meta"])
@pytest.mark.parametrize("scheme", ["w8a8o16", "w8a16"])
def test_capture_and_compile(name: str, scheme: str) -> None:
    original = block()

    def run() -> Any:
        program, _ = mixq.compile(mixq.capture(original, MANY), force=True, scheme=scheme)
        return program.module()(MANY)

    assert_unchanged(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = mixq.quantize(tiny_llama(), force=True)
    tokens = ids()
    expected = logits(model, tokens)

    def run() -> Any:
        return logits(mixq.load_pretrained(mixq.save_pretrained(copy.deepcopy(model), tmp_path)), tokens)

    if name == "device meta":
        # transformers builds the empty model on the default device; what is written is still right.
        with default(name):
            mixq.save_pretrained(copy.deepcopy(model), tmp_path)
        assert torch.equal(logits(mixq.load_pretrained(tmp_path), tokens), logits(model, tokens))
        return
    assert expected.isfinite().all()
    assert_unchanged(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_data_of_benchmarks(name: str) -> None:
    def run() -> Any:
        cpu = torch.device("cpu")
        weight = planted.random_weight(8, 32, torch.float32, cpu)
        columns = planted.planted_columns(32, 3)
        return columns, weight, planted.planted_activation(6, 32, columns, 10.0, torch.float32, cpu)

    assert_unchanged(name, run)


@pytest.mark.parametrize("name", DEFAULTS)
def test_measuring_and_the_self_test_of_kernels(name: str) -> None:
    measured._mixed_ratio.cache_clear()
    measured._weight_only_ratio.cache_clear()
    with default(name):
        assert availability._product_is_exact(3)
        for ratio in (measured._mixed_ratio, measured._weight_only_ratio):
            with torch.no_grad():
                assert ratio(torch.float32, 8, 2, 32, 16) > 0


def test_many_rows_of_a_weight_only_linear_in_a_process_of_their_own() -> None:
    """Memory that is too small for its values ends a process, which no assertion of it would see."""
    program = (
        "import torch; from torch import nn; from mixq_compile import MixqLinear; "
        "from mixq_compile.schemes.registry import get_scheme; "
        "linear = nn.Linear(512, 256).requires_grad_(False); "
        "module = MixqLinear.from_linear(linear, get_scheme('w8a16')); x = torch.randn(200, 512); "
        "wanted = module(x); torch.set_default_dtype(torch.bfloat16); "
        "assert all(torch.equal(module(x), wanted) for _ in range(5)); print('equal')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=os.getcwd()
    )
    assert done.stdout.strip() == "equal", f"exit code {done.returncode}: {done.stderr[-500:]}"


def test_a_tensor_compares() -> None:
    """The comparison above sees another bit."""
    seen: list[Tensor] = []

    def run() -> Tensor:
        seen.append(torch.tensor([1.0, 1.0 + 2.0**-20 * len(seen)], dtype=torch.float32, device="cpu"))
        return seen[-1]

    with pytest.raises(AssertionError, match="item 0 under the default float64"):
        assert_unchanged("float64", run)
