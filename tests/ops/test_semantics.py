"""What the reference computes, against a float64 simulation of docs/semantics.md."""

from __future__ import annotations

import edge_cases
import numpy as np
import pytest
import simulation
import torch
from simulation import SimulatedState
from torch import Tensor

from mixq_compile import ops
from mixq_compile.formats import TensorFormat
from mixq_compile.ops import linear
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.outlier_state import OVERFLOW, OutlierState
from mixq_compile.ops.weight_codes import dequantize_weight, quantize_weight
from mixq_compile.scheme import WeightRecipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POLICIES = ("exact", "lazy", "frozen", "static", "per_call")
THRESHOLD = 6.0


def planted(rows: int, columns: int, outliers: dict[int, float], seed: int = 0) -> Tensor:
    """Normal numbers within ±4, and in each given column one element of the given size."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).clamp_(-4, 4)
    for place, (column, size) in enumerate(outliers.items()):
        x[place % rows, column] = size
    return x


def simulated(case: edge_cases.OnlineCase) -> SimulatedState:
    state = SimulatedState(case.inputs[0].shape[-1], case.capacity, case.threshold)
    state.preload(sorted(case.known))
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("miss", POLICIES)
@pytest.mark.parametrize("name", edge_cases.ONLINE_CASES)
def test_learning_equals_the_simulation(name: str, miss: str, dtype: torch.dtype) -> None:
    case = edge_cases.ONLINE_CASES[name](dtype)
    expected = simulated(case)
    for number, (x, found) in enumerate(
        zip(case.inputs, edge_cases.learn(case, "ref", miss, "cpu"), strict=True)
    ):
        if number == case.freeze_before_call:
            expected.frozen = True
        call = expected.call(x, miss, case.bits)
        where = f"call {number}: "
        used = int(found["used"])
        assert used == len(call.columns), where + "another number of outlier slots was used"
        codes = found["codes"].reshape(-1, x.shape[-1]).numpy()
        np.testing.assert_array_equal(codes, simulation.codes_of(x, call, case.bits), where + "codes")
        scale = simulation.scale_of(call.row_maximum, case.bits)
        np.testing.assert_array_equal(found["scale"].reshape(-1).numpy(), scale, where + "scale")
        outliers = simulation.as_matrix(found["outliers"])
        np.testing.assert_array_equal(
            outliers, simulation.outliers_of(x, call, case.capacity), where + "outliers"
        )
        assert found["index"][: len(expected.slots)].tolist() == expected.slots, where + "column of each slot"
        assert int(found["counters"][0]) == len(expected.slots), where + "count"
        assert int(found["counters"][OVERFLOW]) == expected.overflow, where + "overflow"
        assert float(found["effective_threshold"]) == expected.limit, where + "effective threshold"
        slots = torch.full((x.shape[-1],), -1)
        slots[expected.columns] = torch.arange(len(expected.columns))
        assert found["column_slot"].tolist() == slots.tolist(), where + "slot of each column"


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """One rounding to dtype, and fp32 arithmetic before it, may lie between."""
    unit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    finite = expected[expected.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected, rtol=1.01 * unit, atol=2e-6 * max(size, 1.0), equal_nan=True
    )


def whole_linear(
    x: Tensor,
    bias: Tensor | None,
    weight: list[Tensor],
    state: OutlierState,
    cache: list[Tensor],
    bits: int,
) -> Tensor:
    recipe = LinearRecipe(
        WeightRecipe(TensorFormat(bits)), TensorFormat(bits), "exact", THRESHOLD, batch_invariant=True
    )
    return linear(x, bias, weight, list(state.buffers()), cache, None, str(recipe))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("originals", [True, False], ids=["originals", "codes"])
@pytest.mark.parametrize("leading", [(0,), (1,), (7,), (2, 3), ()], ids=str)
def test_linear_equals_the_simulation(
    leading: tuple[int, ...], originals: bool, bits: int, dtype: torch.dtype
) -> None:
    rows, in_features, out_features, capacity = max(1, int(np.prod(leading))), 51, 37, 16
    sizes = {3: 20.0, 44: -9.0, 50: 7.0}
    x = planted(rows, in_features, sizes)[: int(np.prod(leading))].reshape(*leading, in_features).to(dtype)
    weight = planted(out_features, in_features, {}, seed=1).to(dtype)
    bias = torch.linspace(-3, 3, out_features).to(dtype)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(bits)))
    state = OutlierState.create(in_features, capacity, THRESHOLD, "cpu")
    cached, cache = (
        torch.full((capacity,), -1, dtype=torch.int32),
        torch.zeros(out_features, capacity, dtype=dtype),
    )
    original = weight if originals else weight.new_empty(0)
    result = whole_linear(x, bias, [codes, scale, original], state, [cached, cache], bits)
    assert result.shape == (*leading, out_features)
    assert result.dtype == dtype
    rebuilt = dequantize_weight(codes, scale, in_features)
    source = weight if originals else rebuilt.to(dtype)
    call = SimulatedState(in_features, capacity, THRESHOLD).call(x, "exact")
    assert_near(result, simulation.linear(x, call, bits, rebuilt, source, bias), dtype)


def test_error_is_within_half_a_step_of_every_factor() -> None:
    x = planted(9, 128, {5: 30.0, 77: -12.0})
    weight = planted(40, 128, {}, seed=1)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(8)))
    state = OutlierState.create(128, 16, THRESHOLD, "cpu")
    quantized, row_scale, outliers, count = ops.quantize_online(
        x, *state.buffers(), "int8", "exact", 0, "ref"
    )
    cached, cache = [torch.full((16,), -1, dtype=torch.int32)], [torch.zeros(40, 16)]
    ops.refresh_outlier_weights(
        quantized, state.index, count, cached, cache, [codes], [scale], [weight], 0, "ref"
    )
    result = ops.mixed_linear(
        x, quantized, row_scale, outliers, count, codes, scale, cache[0], None, 0, "ref"
    )
    inner = x.clone().double()
    inner[:, state.columns()] = 0.0
    half_steps = row_scale.double()[:, None] / 2 * dequantize_weight(codes, scale, 128).double().abs().sum(1)
    half_steps += inner.abs().sum(1)[:, None] * scale.double() / 2
    error = (result.double() - x.double() @ weight.double().T).abs()
    assert bool((error <= half_steps * (1 + 1e-5) + 1e-5).all())
    assert row_scale.max() <= THRESHOLD / 127, "the outliers are still in the row scale"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_exactly_at_the_threshold_is_no_outlier_but_one_step_above_is(dtype: torch.dtype) -> None:
    for threshold in (6.0, 0.3, 5.1):
        limit = torch.tensor(threshold, dtype=torch.float32).to(dtype).float()
        above = torch.nextafter(limit.to(dtype), torch.tensor(torch.inf, dtype=dtype))
        for size, found in ((limit, []), (-above, [4])):
            state = OutlierState.create(20, 16, float(limit), "cpu")
            x = torch.zeros(3, 20, dtype=dtype)
            x[1, 4] = size
            ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
            assert state.columns() == found, f"{float(size)!r} against a threshold of {float(limit)!r}"


@pytest.mark.parametrize("miss", ["exact", "frozen", "lazy"])
@pytest.mark.parametrize("seed", range(8))
def test_after_an_exact_call_no_row_exceeds_the_effective_threshold(seed: int, miss: str) -> None:
    """Also where columns overflow, call after call; lazy catches up one call later."""
    generator = torch.Generator().manual_seed(seed)
    state = OutlierState.create(60, 16, THRESHOLD, "cpu")
    survivors: dict[int, int] = {}
    for _ in range(6):
        x = torch.randn(5, 60, generator=generator) * torch.rand(60, generator=generator).mul(6).exp()
        calls = 2 if miss == "lazy" else 1
        for _ in range(calls):
            _, scale, _, _ = ops.quantize_online(x, *state.buffers(), "int8", miss, 0, "ref")
        assert float(scale.max()) * 127 <= float(state.effective_threshold) * (1 + 1e-6)
        columns = state.columns()
        assert len(set(columns)) == len(columns) <= 16
        for slot, column in enumerate(columns):
            if column in survivors:
                assert survivors[column] == slot, f"column {column} moved while it stayed an outlier"
        survivors = {column: slot for slot, column in enumerate(columns)}


def test_overflow_does_not_miss_again() -> None:
    state = OutlierState.create(64, 16, THRESHOLD, "cpu")
    x = planted(40, 64, {column: 10.0 + column for column in range(40)})
    ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
    assert state.overflow() == 40 - 16
    assert sorted(state.columns()) == list(range(24, 40)), "not the largest ones stayed"
    assert float(state.effective_threshold) == 10.0 + 23
    before = [buffer.clone() for buffer in state.buffers()]
    ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
    assert all(torch.equal(now, then) for now, then in zip(state.buffers(), before, strict=True))


def test_lazy_quantizes_with_the_columns_known_before_the_call() -> None:
    state = OutlierState.create(32, 16, THRESHOLD, "cpu")
    x = planted(4, 32, {7: 50.0})
    _, first_scale, outliers, used = ops.quantize_online(x, *state.buffers(), "int8", "lazy", 0, "ref")
    assert int(used) == 0, "the call used a column that it found itself"
    assert not outliers.any()
    assert float(first_scale.max()) * 127 == pytest.approx(50.0)
    assert state.columns() == [7]
    _, second_scale, _, used = ops.quantize_online(x, *state.buffers(), "int8", "lazy", 0, "ref")
    assert int(used) == 1
    assert float(second_scale.max()) * 127 <= THRESHOLD


@pytest.mark.parametrize("miss", ["exact", "lazy", "frozen", "per_call"])
def test_frozen_state_enlarges_the_row_scale_instead(miss: str) -> None:
    state = OutlierState.create(32, 16, THRESHOLD, "cpu")
    state.preload([3])
    state.freeze()
    x = planted(4, 32, {7: 50.0})
    codes, scale, _, used = ops.quantize_online(x, *state.buffers(), "int8", miss, 0, "ref")
    assert state.columns() == [3]
    assert int(used) == 1
    assert float(scale.max()) * 127 == pytest.approx(50.0)
    assert codes[0, 7] == 127


def test_per_call_remembers_nothing_and_takes_elements_at_the_threshold() -> None:
    state = OutlierState.create(32, 16, THRESHOLD, "cpu")
    for columns in ({7: 50.0, 1: 6.0}, {2: -6.0}, {}):
        _, _, outliers, used = ops.quantize_online(
            planted(4, 32, columns), *state.buffers(), "int8", "per_call", 0, "ref"
        )
        assert state.columns() == sorted(columns)
        assert int(used) == len(columns)
        assert not outliers[:, len(columns) :].any(), "slots beyond the count are not zero"


def test_not_finite_rows_give_nan_teach_nothing_and_disturb_no_other_row() -> None:
    x = planted(5, 32, {})
    weight = planted(24, 32, {}, seed=1)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(8)))

    def run(inputs: Tensor) -> tuple[Tensor, OutlierState]:
        state = OutlierState.create(32, 16, THRESHOLD, "cpu")
        state.preload([9])
        cached, cache = torch.full((16,), -1, dtype=torch.int32), torch.zeros(24, 16)
        result = whole_linear(inputs, None, [codes, scale, weight], state, [cached, cache], 8)
        return result, state

    clean, _ = run(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        for column in (4, 9):
            dirty = x.clone()
            dirty[2, column] = value
            dirty[2, 20] = 1000.0
            result, state = run(dirty)
            assert not result[2].isfinite().any(), f"{value} in column {column} was hidden"
            others = [0, 1, 3, 4]
            assert torch.equal(result[others], clean[others]), (
                f"{value} in column {column} spread to other rows"
            )
            assert state.columns() == [9], "a row that is not finite taught a column"


def test_tiny_rows_have_zero_codes_and_finite_results() -> None:
    x = torch.zeros(4, 32)
    x[1] = 1e-42
    x[2] = 2.0**-97
    x[3] = 2.0**-95
    state = OutlierState.create(32, 16, THRESHOLD, "cpu")
    codes, scale, _, _ = ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert not codes[:3].any()
    assert (codes[3] == 127).all()


def test_accumulators_beyond_the_range_of_fp16_do_not_pass_through_it() -> None:
    """K = 2048 codes of up to 8: sums reach 131072, and fp16 ends at 65504."""
    generator = torch.Generator().manual_seed(0)
    rows, in_features, out_features = 16, 2048, 24
    codes = torch.randint(-8, 8, (rows, in_features), generator=generator).to(torch.int8)
    weight_codes = torch.randint(-8, 8, (out_features, in_features), generator=generator).to(torch.int8)
    codes[0], weight_codes[0] = -8, -8
    scale = torch.full((rows,), 1e-3)
    weight_scale = torch.full((out_features,), 1e-3)
    nothing = torch.zeros(rows, 0, dtype=torch.float16)
    result = ops.mixed_linear(
        torch.zeros(rows, in_features, dtype=torch.float16), codes, scale, nothing,
        torch.zeros(1, dtype=torch.int32), weight_codes, weight_scale,
        torch.zeros(out_features, 0, dtype=torch.float16), None, 0, "ref",
    )  # fmt: skip
    expected = codes.double() @ weight_codes.double().T * 1e-6
    assert result.isfinite().all()
    assert float(result[0, 0]) == pytest.approx(0.131072, rel=1e-3)
    torch.testing.assert_close(result.double(), expected, rtol=2.0**-10, atol=1e-6)


def test_the_largest_integer_sum_is_exact() -> None:
    """K = 28672 at 127 squared is 462 million: within int32, beyond the exact range of fp32."""
    codes = torch.full((1, 28672), 127, dtype=torch.int8)
    weight_codes = codes.clone()
    weight_codes[0, 0] = 126
    accumulator, _ = ops.mixed_gemm(
        codes, torch.zeros(1, 0), torch.zeros(1, dtype=torch.int32), weight_codes, torch.zeros(1, 0), "ref"
    )
    assert int(accumulator) == 28672 * 127 * 127 - 127


@pytest.mark.parametrize("miss", POLICIES)
def test_strides_and_leading_dimensions_do_not_matter(miss: str) -> None:
    matrix = planted(6, 40, {3: 20.0, 30: -11.0})
    spellings = {
        "transposed": matrix.T.contiguous().T,
        "every other row": matrix.repeat_interleave(2, dim=0)[::2],
        "part of a wider one": torch.cat([matrix, matrix], dim=1)[:, :40],
        "three dimensions": matrix.reshape(2, 3, 40),
        "permuted dimensions": matrix.reshape(2, 3, 40).transpose(0, 1).contiguous().transpose(0, 1),
    }
    plain = OutlierState.create(40, 16, THRESHOLD, "cpu")
    expected = ops.quantize_online(matrix, *plain.buffers(), "int8", miss, 0, "ref")
    for name, x in spellings.items():
        state = OutlierState.create(40, 16, THRESHOLD, "cpu")
        codes, scale, outliers, _ = ops.quantize_online(x, *state.buffers(), "int8", miss, 0, "ref")
        assert torch.equal(codes.reshape(6, 40), expected[0]), name
        assert torch.equal(scale.reshape(6), expected[1]), name
        assert torch.equal(outliers.reshape(6, 16), expected[2]), name
        assert state.columns() == plain.columns(), name


def test_readers_of_one_input_learn_its_columns_once() -> None:
    state = OutlierState.create(32, 16, THRESHOLD, "cpu")
    x = planted(4, 32, {7: 50.0, 30: 8.0})
    first = ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
    second = ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
    assert state.columns() == [7, 30]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_same_state_and_input_give_the_same_bits() -> None:
    x = planted(40, 64, {column: 10.0 + column % 3 for column in range(40)})
    runs = []
    for _ in range(2):
        state = OutlierState.create(64, 16, THRESHOLD, "cpu")
        outputs = ops.quantize_online(x, *state.buffers(), "int8", "exact", 0, "ref")
        runs.append([*outputs, *state.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("known", [[], [2, 5], list(range(16))], ids=["none", "some", "all"])
def test_small_calls_take_the_weight_only_path_and_learn_nothing(known: list[int]) -> None:
    state = OutlierState.create(32, 16, THRESHOLD, "cpu")
    state.preload(known)
    before = [buffer.clone() for buffer in state.buffers()]
    x = planted(4, 32, {7: 50.0})
    weight = planted(24, 32, {}, seed=1)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(8)))
    cached, cache = torch.full((16,), -1, dtype=torch.int32), torch.zeros(24, 16)
    quantized = ops.quantize_online(x, *state.buffers(), "int8", "exact", 4, "ref")
    ops.refresh_outlier_weights(
        quantized[0], state.index, quantized[3], [cached], [cache], [codes], [scale], [weight], 4, "ref"
    )
    result = ops.mixed_linear(
        x, quantized[0], quantized[1], quantized[2], quantized[3], codes, scale, cache, None, 4, "ref"
    )
    assert torch.equal(result, ops.weight_only_linear(x, codes, scale, None, "ref"))
    assert all(torch.equal(now, then) for now, then in zip(state.buffers(), before, strict=True))
    assert (cached == -1).all(), "a call of few rows fetched outlier weights"
    torch.testing.assert_close(result, x @ dequantize_weight(codes, scale, 32).T, rtol=1e-5, atol=1e-5)
