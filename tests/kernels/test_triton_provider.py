"""What the Triton provider says of itself, on any machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mixq_compile.formats import INT4, INT8
from mixq_compile.kernels.tl import measured, toolkit, tuning
from mixq_compile.kernels.tl.speed_table import shipped
from mixq_compile.ops.providers import KernelQuery, load_providers, providers_of

GPU = torch.device("cuda", 0)
LINEAR = KernelQuery("mixed_linear", GPU, torch.bfloat16, INT8, INT8, 4096, 11008)


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA H200")


def test_implements_every_operator():
    load_providers()
    for op in (
        "quantize", "quantize_online", "refresh_outlier_weights", "mixed_gemm", "dequantize",
        "mixed_linear", "weight_only_linear",
    ):  # fmt: skip
        assert "tl" in {entry.name for entry in providers_of(op)}


def test_refuses_cpu_tensors():
    pytest.importorskip("triton")
    query = KernelQuery("mixed_linear", torch.device("cpu"), torch.float32)
    assert "NVIDIA GPU" in toolkit.supports(query)


def test_refuses_old_gpus(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(toolkit, "capability", lambda device: (7, 5))
    assert toolkit.supports(LINEAR) == (
        "needs an NVIDIA GPU of compute capability 8.0 or newer; this one has 7.5"
    )
    monkeypatch.setattr(toolkit, "capability", lambda device: (8, 0))
    assert toolkit.supports(LINEAR) is True


def test_every_module_can_be_imported_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from mixq_compile.ops.providers import KernelQuery, load_providers, rejections\n"
        "load_providers()\n"
        "chosen, refused = rejections(KernelQuery('quantize', torch.device('cuda'), torch.bfloat16))\n"
        "assert chosen.name == 'ref', chosen\n"
        "print(refused['tl'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "pip install 'triton>=3.6'" in ran.stdout


@pytest.mark.usefixtures("h200")
def test_speedup_is_the_measured_one_and_between_them():
    table = shipped("NVIDIA H200")
    assert table is not None
    gains = table.entries[8, 11008, 4096]
    assert measured.speedup(LINEAR, 1024) == gains[1024]
    assert measured.speedup(LINEAR, 10**6) == gains[4096]
    assert min(gains[256], gains[512]) < measured.speedup(LINEAR, 400) < max(gains[256], gains[512])


@pytest.mark.usefixtures("h200")
def test_speedup_is_not_known_for_fp32_and_unknown_shapes():
    assert (
        measured.speedup(KernelQuery("mixed_linear", GPU, torch.float32, INT8, INT8, 4096, 4096), 64) is None
    )
    assert measured.speedup(KernelQuery("mixed_linear", GPU, torch.bfloat16), 64) is None


def test_speedup_is_not_known_where_it_cannot_be_measured(monkeypatch):
    monkeypatch.setattr(measured, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(tuning, "can_measure", lambda query: False)
    assert measured.speedup(LINEAR, 1024) is None


def query_of(weight, in_features, out_features):
    return KernelQuery("mixed_linear", GPU, torch.bfloat16, weight, INT8, in_features, out_features)


def test_small_batches():
    assert measured.small_batch(LINEAR) == 16
    assert measured.small_batch(query_of(INT8, 11008, 4096)) == 32
    assert measured.small_batch(query_of(INT4, 4096, 11008)) == 64
