"""The Triton provider on a GPU: the edge cases, large shapes, captured graphs and repeats."""

from __future__ import annotations

import edge_cases
import pytest
import torch

from mixq_compile import ops
from mixq_compile.formats import INT8
from mixq_compile.ops.outlier_state import COUNT, OVERFLOW, OutlierState
from mixq_compile.ops.providers import KernelQuery, choose, load_providers, small_batch_limit

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
@pytest.mark.parametrize("miss", edge_cases.POLICIES)
def test_learning_is_bit_identical(name, miss):
    for dtype in DTYPES if miss == "exact" else (torch.bfloat16,):
        case = edge_cases.ONLINE_CASES[name](dtype)
        expected = edge_cases.learn(case, "ref", miss, "cpu")
        edge_cases.assert_same(edge_cases.learn(case, "tl", miss, "cuda"), expected)


@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_fixed_columns_are_bit_identical(name):
    case = edge_cases.ONLINE_CASES[name](torch.float16)
    expected = edge_cases.quantize_fixed(case, "ref", "cpu")
    edge_cases.assert_same(edge_cases.quantize_fixed(case, "tl", "cuda"), expected)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1500, 4096), (1030, 256), (300, 11008), (40, 28672), (17, 20001), (2000, 1001)]
)
def test_large_inputs_are_bit_identical(rows, columns):
    x = torch.randn(rows, columns, dtype=torch.bfloat16)
    x[:, :: columns // 40] *= 20
    case = edge_cases.OnlineCase([x, x * 1.5, x * 40], capacity=48)
    expected = edge_cases.learn(case, "ref", "exact", "cpu")
    assert expected[-1]["counters"][OVERFLOW] > 0
    edge_cases.assert_same(edge_cases.learn(case, "tl", "exact", "cuda"), expected)


@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_linear(name, dtype):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cuda")
    found = edge_cases.product(tensors, "tl")
    expected = edge_cases.expected_product(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))


@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only(name, dtype):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cuda")
    found = edge_cases.product(tensors, "tl", small_m=1000)
    expected = edge_cases.expected_weight_only(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))


@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
def test_unfused_products(name):
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], torch.bfloat16, "cuda")
    found = edge_cases.unfused_product(tensors, "tl")
    expected = edge_cases.expected_product(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(torch.bfloat16))


SHAPES = [
    (1, 4096, 1024), (2, 1000, 520), (16, 4096, 2048), (33, 4096, 1536), (64, 2064, 11008), (65, 640, 264),
    (200, 4096, 4096), (256, 11008, 1024), (300, 4104, 776), (700, 2048, 1032), (1030, 4096, 5000),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_products_of_real_sizes(shape, weight_bits):
    rows, in_features, out_features = shape
    dtype = HALVES[rows % 2]
    case = edge_cases.LinearCase(
        rows, in_features, out_features, outliers=40, capacity=128, weight_bits=weight_bits, originals=True
    )
    tensors = edge_cases.linear(case, dtype, "cuda", seed=rows)
    mixed, weight_only = edge_cases.product(tensors, "tl"), edge_cases.product(tensors, "tl", small_m=2000)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for found, expected in (
        (mixed, edge_cases.expected_product(tensors)),
        (weight_only, edge_cases.expected_weight_only(tensors)),
    ):
        assert float((found.double() - expected).norm() / expected.norm()) < unit
    assert torch.equal(edge_cases.product(tensors, "tl"), mixed)
    assert torch.equal(edge_cases.product(tensors, "tl", small_m=2000), weight_only)


ACTIVATED = [
    (7, 256, 192), (64, 2064, 1024), (200, 1024, 4096), (300, 4104, 776), (700, 2048, 2080),
    (1030, 4096, 11016), (1500, 1000, 3000),
]  # fmt: skip


@pytest.mark.parametrize("shape", ACTIVATED)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activation_functions(function, gated, shape):
    """In the epilogue, and in a launch of its own for few rows and for halves of 1500 features."""
    rows, in_features, out_features = shape
    dtype = HALVES[rows % 2]
    case = edge_cases.LinearCase(
        rows, in_features, out_features, outliers=40, capacity=64, weight_bits=4 if rows == 700 else 8
    )
    tensors = edge_cases.linear(case, dtype, "cuda", seed=rows)
    small_m = 16
    found = edge_cases.activated_product(tensors, "tl", function, gated, small_m)
    wanted = edge_cases.expected_weight_only if rows <= small_m else edge_cases.expected_product
    expected = edge_cases.expected_activation(wanted(tensors), function, gated)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert float((found.double() - expected).norm() / expected.norm()) < unit
    assert torch.equal(edge_cases.activated_product(tensors, "tl", function, gated, small_m), found)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("function", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activation_functions_of_any_number(function, gated):
    """Far from zero and not finite: as torch's, to the last bits of the function's approximation."""
    case = edge_cases.LinearCase(256, 128, 256, outliers=0, capacity=0, bias=True)
    tensors = edge_cases.linear(case, torch.float16, "cuda")
    tensors.bias.copy_(torch.linspace(-12, 12, 256))
    tensors.x.mul_(1e-3)
    tensors.x[5, 7] = torch.nan
    found = edge_cases.activated_product(tensors, "tl", function, gated)
    plain = edge_cases.activated_product(tensors, "ref", function, gated)
    torch.testing.assert_close(found, plain, rtol=2e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("rows", "features"), [(1024, 10240), (1000, 11000)])
def test_shared_tiles(rows, features):
    """A partly filled last wave: the sums of two programs make one tile, in graphs and on streams alike."""
    case = edge_cases.LinearCase(rows, 2320, features, outliers=40, capacity=64, originals=True)
    tensors = edge_cases.linear(case, torch.bfloat16, "cuda")
    first = edge_cases.product(tensors, "tl")
    expected = edge_cases.expected_product(tensors)
    assert float((first.double() - expected).norm() / expected.norm()) < 2.0**-8
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [edge_cases.product(tensors, "tl") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(edge_cases.product(tensors, "tl"))
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(first, other) for other in (*found, *captured))


@pytest.mark.parametrize("dtype", HALVES)
def test_tensor_descriptors(dtype, monkeypatch):
    from mixq_compile.kernels.tl import hopper, mixed_linear

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs tensor descriptors")
    monkeypatch.setattr(hopper, "available", lambda device: False)
    assert mixed_linear.hopper is hopper
    for rows in (30, 300, 1030):
        tensors = edge_cases.linear(
            edge_cases.LinearCase(rows, 2064, 1288, outliers=40, capacity=128), dtype, "cuda"
        )
        found, expected = edge_cases.product(tensors, "tl"), edge_cases.expected_product(tensors)
        torch.testing.assert_close(found.double(), expected, rtol=2.0**-7, atol=2.0**-4)


def test_outlier_weights_follow_the_state():
    edge_cases.check_refresh_follows_the_state("tl", torch.bfloat16, "cuda")


def test_rows_that_are_not_finite_spoil_no_other():
    edge_cases.check_not_finite_rows("tl", torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absurd_rows_teach_nothing(dtype):
    edge_cases.check_absurd_rows_teach_nothing("tl", dtype, "cuda")


def test_sums_beyond_half_precision():
    edge_cases.check_large_sums("tl", "cuda")


def _online_linear(tensors: edge_cases.Linear, x: torch.Tensor, miss: str = "exact") -> torch.Tensor:
    state = tensors.state
    codes, scale, outliers, count = ops.quantize_online(x, *state.buffers(), "int8", miss, 0, "tl")
    ops.refresh_outlier_weights(
        codes, state.index, count, [tensors.cached_index], [tensors.outlier_weight], [tensors.codes],
        [tensors.scale], [tensors.original], 0, "tl",
    )  # fmt: skip
    return ops.mixed_linear(
        x, codes, scale, outliers, count, tensors.codes, tensors.scale, tensors.outlier_weight,
        tensors.bias, 0, "tl",
    )  # fmt: skip


CASE = edge_cases.LinearCase(100, 512, 384, outliers=0, capacity=16)


def _growing_inputs() -> list[torch.Tensor]:
    inputs = []
    for call in range(6):
        x = torch.randn(100, 512, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(call))
        x[:, call * 7 : call * 7 + 5] *= 20 + call  # 30 columns in the end: more than there are slots
        inputs.append(x.cuda())
    return inputs


@pytest.mark.parametrize("miss", ["exact", "lazy", "per_call"])
def test_captured_graph_learns(miss):
    inputs = _growing_inputs()
    eager = edge_cases.linear(CASE, torch.bfloat16, "cuda")
    expected = [(_online_linear(eager, x, miss), *(b.clone() for b in eager.state.buffers())) for x in inputs]
    assert int(eager.state.counters[OVERFLOW]) > 0 or miss == "per_call"

    captured = edge_cases.linear(CASE, torch.bfloat16, "cuda")
    place = inputs[0].clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        _online_linear(captured, place, miss)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _online_linear(captured, place, miss)
    captured.state.reset()
    captured.cached_index.fill_(-1)
    captured.outlier_weight.zero_()
    for x, (wanted, *buffers) in zip(inputs, expected, strict=True):
        place.copy_(x)
        graph.replay()
        assert torch.equal(out, wanted)
        for mine, theirs in zip(captured.state.buffers(), buffers, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("miss", edge_cases.POLICIES)
def test_never_waits_for_the_device(miss):
    tensors = edge_cases.linear(CASE, torch.bfloat16, "cuda")
    x = _growing_inputs()[0]
    _online_linear(tensors, x, miss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _online_linear(tensors, x, miss)
        edge_cases.product(tensors, "tl", small_m=1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_are_bit_identical():
    inputs = _growing_inputs()
    first = None
    for _ in range(20):
        tensors = edge_cases.linear(CASE, torch.bfloat16, "cuda")
        results = [_online_linear(tensors, x) for x in inputs] + list(tensors.state.buffers())
        if first is not None:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, first, strict=True))
        first = results


def test_two_streams_share_a_frozen_state():
    tensors = edge_cases.linear(CASE, torch.bfloat16, "cuda")
    inputs = _growing_inputs()[:2]
    _online_linear(tensors, inputs[0])
    tensors.state.freeze()
    expected = [_online_linear(tensors, x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        found = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(_online_linear(tensors, x))
        torch.cuda.synchronize()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_exact_calls_end_below_the_threshold():
    state = OutlierState.create(512, 16, 6.0, "cuda")
    for x in _growing_inputs():
        _, scale, _, count = ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "tl")
        assert float(scale.max()) * 127 <= float(state.effective_threshold) * (1 + 1e-6)
        assert int(count) == int(state.counters[COUNT])


@pytest.mark.parametrize("miss", edge_cases.POLICIES)
def test_padding_teaches_nothing(miss):
    edge_cases.check_padding_teaches_nothing("tl", miss, torch.bfloat16, "cuda")


def test_is_chosen_on_a_gpu():
    load_providers()
    query = KernelQuery("mixed_linear", torch.device("cuda"), torch.bfloat16, INT8, INT8, 4096, 4096)
    assert choose(query).name == "tl"
    assert small_batch_limit(query) > 0
