"""The CPU provider against the reference, bit for bit, and against float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import edge_cases
import pytest
import torch

from mixq_compile import ops
from mixq_compile.errors import KernelError
from mixq_compile.formats import INT8
from mixq_compile.kernels.cpu import availability, build, linears, measured
from mixq_compile.kernels.cpu import quantized_linear as cpu_quantized_linear
from mixq_compile.kernels.cpu.linears import LinearOperands
from mixq_compile.ops.outlier_state import COUNT, OVERFLOW, OutlierState
from mixq_compile.ops.providers import KernelQuery, choose, load_providers, small_batch_limit
from mixq_compile.ops.quantized_linear import quantized_linear
from mixq_compile.ops.weight_codes import integer_codes

load_providers()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST_STEP = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-24}


def _magnitudes(tensors: edge_cases.Linear) -> torch.Tensor:
    """float64 `[..., N]`: the product with the magnitude of every term."""
    signs = edge_cases.Linear(**vars(tensors))
    weight = integer_codes(tensors.codes, tensors.x.shape[-1])
    signs.codes, signs.x = weight.abs(), tensors.x.abs()
    signs.original = tensors.original.abs()
    signs.bias = None if tensors.bias is None else tensors.bias.abs()
    return edge_cases.expected_product(signs)


def _assert_rounded(found: torch.Tensor, tensors: edge_cases.Linear, slots: int) -> None:
    """One rounding to the result's dtype, and one of float32 for each term before it."""
    expected = edge_cases.expected_product(tensors)
    terms = (slots + 5) * ROUNDING[torch.float32] * _magnitudes(tensors)
    allowed = terms + ROUNDING[found.dtype] * (expected.abs() + terms) + SMALLEST_STEP[found.dtype]
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("miss", edge_cases.POLICIES)
@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_learning_is_bit_identical(name, miss, dtype):
    case = edge_cases.ONLINE_CASES[name](dtype)
    expected = edge_cases.learn(case, "ref", miss, "cpu")
    edge_cases.assert_same(edge_cases.learn(case, "cpu", miss, "cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_fixed_columns_are_bit_identical(name, dtype):
    case = edge_cases.ONLINE_CASES[name](dtype)
    expected = edge_cases.quantize_fixed(case, "ref", "cpu")
    edge_cases.assert_same(edge_cases.quantize_fixed(case, "cpu", "cpu"), expected)


@pytest.mark.parametrize(("rows", "columns"), [(700, 384), (300, 1001), (40, 4096), (1030, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_inputs_are_bit_identical(rows, columns, dtype):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:, :: max(1, columns // 40)] *= 20
    case = edge_cases.OnlineCase([x.to(dtype), (x * 1.5).to(dtype), (x * 40).to(dtype)], capacity=16)
    expected = edge_cases.learn(case, "ref", "exact", "cpu")
    assert expected[-1]["counters"][OVERFLOW] > 0
    edge_cases.assert_same(edge_cases.learn(case, "cpu", "exact", "cpu"), expected)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_learn_nothing(rows):
    state = OutlierState.create(32, 16, 6.0, "cpu")
    before = [buffer.clone() for buffer in state.buffers()]
    x = torch.full((rows, 32), 50.0)
    _, _, outliers, used = ops.quantize_online(x, *state.buffers(), "int8", "exact", 3, "cpu")
    assert int(used) == 0
    assert not outliers.any()
    assert all(torch.equal(old, now) for old, now in zip(before, state.buffers(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
def test_mixed_linear(name, dtype):
    case = edge_cases.LINEAR_CASES[name]
    tensors = edge_cases.linear(case, dtype, "cpu")
    for product in (edge_cases.product, edge_cases.unfused_product):
        found = product(tensors, "cpu")
        assert found.dtype == dtype
        _assert_rounded(found, tensors, case.outliers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", edge_cases.LINEAR_CASES)
@pytest.mark.parametrize("streamed_rows", [0, 1000])
def test_weight_only_linear(name, dtype, streamed_rows, monkeypatch):
    monkeypatch.setattr(linears, "STREAMED_ROWS", streamed_rows)
    monkeypatch.setattr(linears, "EXPANDED_ELEMENTS", 1000)
    tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cpu")
    found = edge_cases.product(tensors, "cpu", small_m=1000)
    expected = edge_cases.expected_weight_only(tensors)
    torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("features", [1, 15, 16, 63, 65, 130])
def test_every_tile_gives_exact_sums(features, weight_bits):
    generator = torch.Generator().manual_seed(features)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11, 97, 101):
        columns = 1 + (37 * rows + features) % 200
        shape = (features, columns) if weight_bits == 8 else (features, (columns + 1) // 2)
        codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        weight = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        weight = weight.view(torch.int8) if weight_bits == 8 else weight
        none = torch.zeros(rows, 0)
        found, _ = ops.mixed_gemm(
            codes, none, torch.zeros(1, dtype=torch.int32), weight, torch.zeros(features, 0), "cpu"
        )
        assert torch.equal(found.double(), codes.double() @ integer_codes(weight, columns).double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_or_on_threads(dtype):
    tensors = edge_cases.linear(
        edge_cases.LinearCase(300, 200, 150, outliers=20, capacity=32, originals=True), dtype, "cpu"
    )
    whole = edge_cases.product(tensors, "cpu")
    assert torch.equal(edge_cases.product(tensors, "cpu"), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(edge_cases.product(tensors, "cpu"), whole)
    finally:
        torch.set_num_threads(threads)
    for first, rows in ((0, 1), (7, 2), (100, 5), (13, 101)):
        part = edge_cases.Linear(**vars(tensors) | {"x": tensors.x[first : first + rows]})
        assert torch.equal(edge_cases.product(part, "cpu"), whole[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refreshed_weights_follow_the_state(dtype):
    edge_cases.check_refresh_follows_the_state("cpu", dtype, "cpu")


def test_refreshing_reads_transposed_originals():
    tensors = edge_cases.linear(edge_cases.LinearCase(4, 64, 40, originals=True), torch.bfloat16, "cpu")
    expected = tensors.original[:, tensors.state.columns()].clone()
    tensors.original = tensors.original.T.contiguous().T
    edge_cases.refresh(tensors, "cpu")
    assert torch.equal(tensors.outlier_weight[:, :3], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_finite_rows(dtype):
    edge_cases.check_not_finite_rows("cpu", dtype, "cpu")


@pytest.mark.parametrize("kernel", ["ref", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absurd_rows_teach_nothing(kernel, dtype):
    edge_cases.check_absurd_rows_teach_nothing(kernel, dtype, "cpu")


def test_large_sums():
    edge_cases.check_large_sums("cpu", "cpu", rows=256, out_features=320)


def test_a_bias_of_another_dtype_and_a_shared_input():
    tensors = edge_cases.linear(edge_cases.LinearCase(9, 64, 40), torch.bfloat16, "cpu")
    expected = edge_cases.product(tensors, "cpu")
    tensors.bias = tensors.bias.float()
    assert torch.equal(edge_cases.product(tensors, "cpu"), expected)


def _operands(tensors: edge_cases.Linear) -> LinearOperands:
    edge_cases.refresh(tensors, "cpu")
    state = tensors.state
    codes, scale, outliers = ops.quantize(
        tensors.x, state.index, state.column_slot, state.counters, "int8", 0, "cpu"
    )
    return LinearOperands(
        codes, scale, outliers, state.counters, tensors.codes, tensors.scale, tensors.outlier_weight,
        tensors.bias,
    )  # fmt: skip


def _quantized(
    operands: LinearOperands, activation: str, state: OutlierState, miss: str
) -> list[torch.Tensor]:
    """What `quantized_linear` returns, and the state after it."""
    found = quantized_linear(
        operands.codes, *state.buffers(), operands.scale, operands.outliers, operands.count,
        operands.weight_codes, operands.weight_scale, operands.outlier_weight, operands.bias, activation,
        "int8", miss, "cpu",
    )  # fmt: skip
    return [*found, *state.buffers()]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("miss", edge_cases.POLICIES)
@pytest.mark.parametrize("rows", [5, 300])
def test_quantized_linear_is_linear_then_quantization(rows, miss, activation):
    operands = _operands(edge_cases.linear(edge_cases.LinearCase(rows, 64, 70), torch.float32, "cpu"))
    linear = operands.multiply(torch.empty(rows, 70))
    value = operands.multiply(torch.empty(rows, 70), activation)
    if activation == "gelu":
        error = (value.double() - torch.nn.functional.gelu(linear.double())).abs()
        # The factor of x is a polynomial good to 2e-7, rounded to float32 near 1.
        assert (error <= 3e-7 * linear.abs()).all()
    else:
        assert torch.equal(value, linear.relu() if activation == "relu" else linear)
    fused, separate = (OutlierState.create(70, 16, 2.0, "cpu") for _ in range(2))
    for state in (fused, separate):
        state.preload([3, 40] if miss == "static" else [])
    for _ in range(3):
        found = _quantized(operands, activation, fused, miss)
        expected = ops.quantize_online(value, *separate.buffers(), "int8", miss, 0, "cpu")
        for mine, theirs in zip(found, (*expected, *separate.buffers()), strict=True):
            assert torch.equal(mine, theirs)
    assert int(fused.counters[COUNT]) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_bits", [8, 4])
def test_quantized_linear_keeps_outliers_in_the_models_dtype(weight_bits, dtype):
    case = edge_cases.LinearCase(300, 64, 70, weight_bits=weight_bits)
    operands = _operands(edge_cases.linear(case, dtype, "cpu"))
    state = OutlierState.create(70, 16, 1e4, "cpu")
    state.preload([3, 40])
    value = operands.multiply(torch.empty(300, 70, dtype=dtype))
    _, _, outliers, used, *_ = _quantized(operands, "none", state, "exact")
    assert int(used) == 2
    assert torch.equal(outliers[:, :2], value[:, [3, 40]])
    assert not outliers[:, 2:].any()


def test_quantized_linear_of_a_weight_too_large_to_pack_at_once(monkeypatch):
    operands = _operands(edge_cases.linear(edge_cases.LinearCase(300, 64, 70), torch.float32, "cpu"))
    states = [OutlierState.create(70, 16, 2.0, "cpu") for _ in range(2)]
    expected = _quantized(operands, "relu", states[0], "exact")
    monkeypatch.setattr(cpu_quantized_linear, "LARGEST_FUSED_WEIGHT", 1000)
    for mine, theirs in zip(_quantized(operands, "relu", states[1], "exact"), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_quantized_linear_of_rows_that_are_not_finite():
    tensors = edge_cases.linear(edge_cases.LinearCase(300, 64, 70), torch.float32, "cpu")
    tensors.x[7, 3] = torch.nan
    state = OutlierState.create(70, 16, 1e4, "cpu")
    for activation in ("none", "gelu"):
        codes, scale, *_ = _quantized(_operands(tensors), activation, state, "exact")
        assert scale.isnan().nonzero().flatten().tolist() == [7]
        assert not codes[7].any()


@pytest.fixture(params=["x86-64", "haswell", "skylake-avx512"])
def other_instructions(request, monkeypatch):
    """Kernels for a processor with fewer instructions than this one may have."""
    needed = {"x86-64": "sse2", "haswell": "avx2", "skylake-avx512": "avx512bw"}[request.param]
    if platform.machine() != "x86_64" or needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"needs a processor with {needed}")
    monkeypatch.setattr(build, "NATIVE", f"-march={request.param}")
    build.library.cache_clear()
    yield
    build.library.cache_clear()


@pytest.mark.usefixtures("other_instructions")
def test_other_instructions():
    assert all(availability._product_is_exact(rows) for rows in (1, 2, 19))
    for dtype in DTYPES:
        for name in ("ragged_columns", "not_finite", "zero_and_subnormal_rows", "grows_then_evicts"):
            test_learning_is_bit_identical(name, "exact", dtype)
        for name in ("ragged_beyond_a_tile", "many_slots", "four_bits_ragged"):
            test_mixed_linear(name, dtype)
            tensors = edge_cases.linear(edge_cases.LINEAR_CASES[name], dtype, "cpu")
            found = edge_cases.product(tensors, "cpu", small_m=1000)
            expected = edge_cases.expected_weight_only(tensors)
            torch.testing.assert_close(found.double(), expected, **edge_cases.tolerance(dtype))
    test_quantized_linear_is_linear_then_quantization(300, "exact", "gelu")


def test_every_half_precision_number_converts(other_instructions):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)[:, None].repeat(1, 2)
        x[:, 1] = 0
        state = OutlierState.create(2, 16, 1e9, "cpu")
        mine = ops.quantize(x, state.index, state.column_slot, state.counters, "int8", 0, "cpu")
        theirs = ops.quantize(x, state.index, state.column_slot, state.counters, "int8", 0, "ref")
        for found, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        values = bits.view(dtype).float()
        scale = torch.cat((values, values * (1 + 2.0**-9), values * (1 + 2.0**-12)))
        one = torch.ones(len(scale), 1, dtype=torch.int8)
        rounded = LinearOperands(
            one, scale, torch.empty(len(scale), 0), state.counters, one[:1], torch.ones(1),
            torch.empty(1, 0), None,
        ).multiply(torch.empty(len(scale), 1, dtype=dtype))  # fmt: skip
        torch.testing.assert_close(rounded[:, 0], scale.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_kernels_for_newer_processors_compile():
    if platform.machine() != "x86_64":
        pytest.skip("for x86 processors")
    assert build.compiled_library("-march=alderlake").exists()


def test_compiled_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "new"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS[:1], "-O0", *build.FLAGS[2:]))
    path = build.compiled_library(build.NATIVE)
    written = path.stat().st_mtime_ns
    assert path.parent == tmp_path / "new"
    assert build.compiled_library(build.NATIVE).stat().st_mtime_ns == written
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv(build.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_directory() == Path("/somewhere/mixq_compile")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_directory() == Path.home() / ".cache" / "mixq_compile"


def test_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(blocked / "folder"))
    assert build._writable_directory().name.startswith("mixq_compile_")


@pytest.fixture
def fresh_process(monkeypatch, tmp_path):
    """Nothing compiled, loaded or decided yet."""
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    for cached in (build.library, availability.reason_unavailable):
        cached.cache_clear()
    yield
    for cached in (build.library, availability.reason_unavailable):
        cached.cache_clear()


@pytest.mark.usefixtures("fresh_process")
def test_without_a_compiler_the_reason_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    verdict = availability.supports(KernelQuery("mixed_linear", torch.device("cpu"), torch.float32))
    assert "no C++ compiler 'no-such-compiler'" in verdict
    assert "apt-get install g++" in verdict
    with pytest.raises(KernelError, match=r"apt-get install g\+\+"):
        build.library()


@pytest.mark.usefixtures("fresh_process")
def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    verdict = availability.supports(KernelQuery("mixed_linear", torch.device("cpu"), torch.float32))
    assert "could not compile" in verdict
    assert "no-such-flag" in verdict
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("fresh_process")
def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setattr(build, "compiled_library", lambda architecture: broken)
    assert "cannot be loaded" in availability.reason_unavailable()


@pytest.mark.usefixtures("fresh_process")
def test_a_wrong_product_is_refused(monkeypatch):
    class Wrong:
        def mixq_mixed_linear(self, arguments):
            pass

    monkeypatch.setattr(availability, "library", Wrong)
    query = KernelQuery("mixed_linear", torch.device("cpu"), torch.float32)
    assert "failed the self-test" in availability.supports(query)


def test_what_is_supported():
    cpu = torch.device("cpu")
    assert availability.supports(KernelQuery("mixed_linear", cpu, torch.bfloat16)) is True
    assert "not torch.float64" in availability.supports(KernelQuery("mixed_linear", cpu, torch.float64))
    cuda = KernelQuery("mixed_linear", torch.device("cuda"), torch.float32)
    assert "not on cuda" in availability.supports(cuda)
    query = KernelQuery("mixed_linear", cpu, torch.float32, INT8, INT8, 64, 64)
    assert choose(query).name == "cpu"
    assert small_batch_limit(query) == 0


def test_a_dtype_that_kernels_do_not_know():
    state = OutlierState.create(4, 16, 6.0, "cpu")
    with pytest.raises(KernelError, match="float32, bfloat16 and float16"):
        ops.quantize(
            torch.ones(2, 4).double(), state.index, state.column_slot, state.counters, "int8", 0, "cpu"
        )


@pytest.mark.parametrize("op", ["mixed_linear", "weight_only_linear"])
def test_speedup_is_measured_once(op, monkeypatch):
    query = KernelQuery(op, torch.device("cpu"), torch.float32, INT8, INT8, 64, 48)
    ratio = choose(query).speedup(query, 100)
    assert ratio > 0
    monkeypatch.setattr(measured, "_ratio_of_times", lambda *functions: pytest.fail("measured again"))
    assert choose(query).speedup(query, 70) == ratio
    assert choose(query).speedup(KernelQuery(op, query.device, query.dtype), 100) is None


def test_measuring_is_bounded():
    for m, in_features, out_features in ((10**6, 384, 384), (1, 8192, 28672), (4096, 28672, 8192), (0, 1, 1)):
        rows, features = measured._measured_shape(m, in_features, out_features)
        assert rows <= min(measured.LARGEST_ROWS, max(1, 2 * m))
        assert features * in_features <= measured.LARGEST_WEIGHT
        assert rows * features * in_features <= measured.LARGEST_PRODUCTS


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_and_the_kernels_share_one_openmp():
    build.library()
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    assert len(mapped) == 1


def test_onednn_without_vnni_changes_nothing():
    program = (
        "from mixq_compile.kernels.cpu.availability import reason_unavailable as reason\n"
        "assert reason() is None, reason()"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize(
    ("multiple", "columns"), [(2, 33), (8, 33), (8, 384), (50, 384), (8, 5000), (50, 5000), (1000, 5000)]
)
def test_rows_on_the_edge_of_a_multiple_teach_as_in_the_reference(multiple: int, columns: int) -> None:
    """A first, rounded look at a row's mean decides only where rounding cannot."""
    generator = torch.Generator().manual_seed(multiple + columns)
    for _ in range(20):
        power, nearness, sign = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        x = torch.randn(1, columns, generator=generator) * 10 ** (40 * power - 20)
        edge = multiple * x[0, 1:].abs().sum() / (columns - multiple)
        x[0, 0] = edge * (1 + (1 if sign > 0.5 else -1) * 10 ** (6 * nearness - 7))
        found = []
        for kernel in ("ref", "cpu"):
            state = OutlierState.create(columns, 16, f"{multiple}x", "cpu")
            ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, kernel)
            found.append((state.columns(), state.column_max.tolist()))
        assert found[0] == found[1]
