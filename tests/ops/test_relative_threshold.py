"""Outlier columns by a multiple of the row's mean magnitude: what `docs/semantics.md` promises of `8x`."""

import itertools
import json
import os

import pytest
import torch

import mixq_compile as mixq
from mixq_compile import ops
from mixq_compile.errors import OptionError
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.outlier_state import MOST_RELATIVE_COLUMNS, OutlierState
from mixq_compile.passes.select_scheme import SelectScheme
from mixq_compile.scheme import OutlierPolicy
from mixq_compile.schemes.registry import get_scheme
from mixq_compile.thresholds import DEFAULT_THRESHOLD, read_threshold, state_number

KERNELS = ["ref", "cpu", *(["tl"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
ROWS, COLUMNS = 12, 200


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp_(-4, 4)


def planted(columns: dict[int, float], seed: int = 0) -> torch.Tensor:
    x = numbers(ROWS, COLUMNS, seed=seed)
    for place, (column, value) in enumerate(columns.items()):
        x[place % ROWS, column] = value
    return x


def state(threshold: float | str = "8x", capacity: int = 16, columns: int = COLUMNS) -> OutlierState:
    return OutlierState.create(columns, capacity, threshold, "cpu")


def call(kept: OutlierState, x: torch.Tensor, miss: str = "exact", kernel: str = "ref", **more):
    return ops.quantize_online(x, *kept.buffers(), "int8", miss, 0, kernel, **more)


def found(kept: OutlierState) -> set[int]:
    return set(kept.columns())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("power", [-40, -3, 3, 17])
def test_a_power_of_two_changes_scales_and_nothing_else(kernel, power):
    plain, scaled = state(), state()
    # More columns than slots, and rows without any, so that growth, eviction and overflow are met.
    many = planted({column: 20.0 + column for column in range(0, 120, 5)})
    for x in (planted({3: 30.0}), many, planted({7: 90.0}, seed=1)):
        codes, scale, outliers, used = call(plain, x, kernel=kernel)
        others = call(scaled, x * 2.0**power, kernel=kernel)
        assert torch.equal(others[0], codes), "codes"
        assert torch.equal(others[1], scale * 2.0**power), "scales"
        assert torch.equal(others[2], outliers * 2.0**power), "outliers"
        assert torch.equal(others[3], used), "columns used"
        for name, mine in plain.named_buffers().items():
            assert torch.equal(scaled.named_buffers()[name], mine), name
    assert plain.overflow() > 0, "the case does not overflow"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_definition(kernel, dtype):
    x = planted({3: 9.0, 50: -30.0, 51: 4.5, 120: 7.0, 199: 6.3}).to(dtype)
    x[5] *= 100
    x[6] /= 1000
    multiples = x.double().abs() / x.double().abs().mean(dim=1, keepdim=True)
    expected = set((multiples > 8).any(dim=0).nonzero().flatten().tolist())
    assert (multiples - 8).abs().min() > 0.01, "an element too near the threshold decides nothing"
    kept = state()
    call(kept, x, kernel=kernel)
    assert found(kept) == expected
    running = multiples.amax(dim=0)[kept.columns()].float()
    # Units of 2^-13 are rounded towards 0: a mean of a hundredth of the largest is right to half a percent.
    torch.testing.assert_close(kept.column_max[: len(expected)], running, rtol=0.005, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_is_judged_by_its_own_size(kernel):
    x = numbers(ROWS, COLUMNS)
    x[2] *= 1000  # a large row without outliers teaches none, though all its values are large
    x[4, 9] = 20.0
    x[4] /= 1000  # and a small row teaches its own, though all its values are small
    kept = state()
    call(kept, x, kernel=kernel)
    assert found(kept) == {9}
    absolute = state(6.0)
    call(absolute, x, kernel=kernel)
    assert absolute.overflow() > 0, "a magnitude of 6 calls all columns of the large row outliers"


@pytest.mark.parametrize("kernel", KERNELS)
def test_columns_do_not_depend_on_those_known_or_on_the_order_of_calls(kernel):
    inputs = [planted({3: 40.0, 8: 12.0}), planted({8: 30.0, 77: -25.0}, seed=1), planted({140: 9.5}, seed=2)]
    sets = []
    for order in itertools.permutations(inputs):
        kept = state()
        for x in order:
            call(kept, x, kernel=kernel)
        sets.append(found(kept))
    assert sets == [{3, 8, 77, 140}] * len(sets)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_exact_call_repeated_learns_nothing_and_gives_the_same_bits(kernel):
    x = planted({column: 20.0 + column for column in range(0, 60, 3)})
    kept = state(capacity=32)
    first = call(kept, x, kernel=kernel)
    before = [buffer.clone() for buffer in kept.buffers()]
    again = call(kept, x, kernel=kernel)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, kept.buffers(), strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_overflow_raises_the_multiple_to_the_largest_left_out(kernel):
    x = numbers(1, COLUMNS).repeat(24, 1)
    for row in range(24):
        x[row, 5 * row] = 20.0 + row  # rows differ in their outlier alone
    kept = state(capacity=16)
    call(kept, x, kernel=kernel)
    assert found(kept) == {5 * row for row in range(8, 24)}, "the sixteen largest multiples stay"
    assert kept.overflow() == 8
    left_out = 27.0 / float(x[7].abs().mean())
    assert float(kept.effective_threshold) == pytest.approx(-left_out, rel=0.005)
    assert float(kept.effective_threshold) < -8
    kept.reset()
    assert kept.effective_threshold.tolist() == [-8.0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_policies_keep_their_meaning(kernel):
    x = planted({3: 40.0})
    lazy, frozen, static, each = state(), state(), state(), state()
    _, _, _, used = call(lazy, x, "lazy", kernel)
    assert (int(used), found(lazy)) == (0, {3}), "lazy: for the next call"
    frozen.freeze()
    call(frozen, x, "frozen", kernel)
    assert found(frozen) == set()
    call(static, x, "static", kernel)
    assert found(static) == set()
    call(each, x, "per_call", kernel)
    assert found(each) == {3}
    call(each, planted({9: 40.0}), "per_call", kernel)
    assert found(each) == {9}, "per_call remembers nothing"


@pytest.mark.parametrize("kernel", KERNELS)
def test_masked_rows_teach_nothing(kernel):
    x = planted({3: 40.0, 9: 40.0})
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[1] = False  # the row of column 9
    kept = state()
    call(kept, x, kernel=kernel, row_mask=mask)
    assert found(kept) == {3}


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_zeros_and_of_one_value_have_no_outliers(kernel):
    kept = state("1.5x")
    call(kept, torch.zeros(3, COLUMNS), kernel=kernel)
    call(kept, torch.full((3, COLUMNS), -7.0), kernel=kernel)
    assert found(kept) == set()


def test_a_linear_whose_input_grows_as_its_weight_shrinks_gives_the_same_bits():
    x, weight = planted({3: 40.0, 60: -25.0}), numbers(32, COLUMNS, seed=5) / 14
    results = []
    for factor in (1.0, 8.0):
        linear = torch.nn.Linear(COLUMNS, 32, bias=False)
        linear.weight.data = weight / factor
        model = mixq.quantize(torch.nn.Sequential(linear), "w8a8o16", force=True)
        with torch.no_grad():
            results.append(model(x * factor))
        (row,) = mixq.report(model).quantized
        assert set(row.outlier_columns) == {3, 60}
    assert torch.equal(*results)


def test_calibrated_columns_are_those_above_the_multiple_of_the_mean():
    linear = torch.nn.Linear(COLUMNS, 32)
    model = torch.nn.Sequential(linear)
    x = planted({3: 40.0, 9: 7.0, 60: -25.0}) / 100  # no magnitude comes near 6
    stats = mixq.calibrate(model, [x])
    quantized = mixq.quantize(model, "w8a8o16", stats=stats, miss="static", force=True)
    (row,) = mixq.report(quantized).quantized
    mean = float(x.abs().mean())
    assert set(row.outlier_columns) == set((x.abs().amax(0) > 8 * mean).nonzero().flatten().tolist())
    assert set(row.outlier_columns) >= {3, 60}


@pytest.mark.parametrize("scheme", ["w8a8o16", "w4a8o16", "w4a4o16"])
def test_schemes_have_it_by_default(scheme):
    assert get_scheme(scheme).outliers.threshold == DEFAULT_THRESHOLD == "8x"


def test_texts_round_trip():
    policy = OutlierPolicy(threshold="12.5x")
    assert OutlierPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    for threshold in ("12.5x", 6.0, float("inf")):
        scheme = get_scheme("w8a8o16").with_outliers(threshold=threshold)
        recipe = LinearRecipe.of(scheme, batch_invariant=False)
        assert LinearRecipe.parse(str(recipe)) == recipe
        assert read_threshold(str(threshold)) == threshold
    assert (state_number("12.5x"), state_number(6.0)) == (-12.5, 6.0)


def test_a_pass_takes_either():
    from mixq_compile.pipeline import Pipeline

    for text, expected in (("12x", "12x"), ("6", 6.0), ("inf", float("inf")), ("none", None)):
        (built,) = Pipeline.parse(f"select-scheme{{threshold={text}}}").passes
        assert isinstance(built, SelectScheme)
        assert built.threshold == expected


@pytest.mark.parametrize("wrong", ["x", "8", "-8x", "0x", "8 x", "8xx", "nanx", ""])
def test_other_texts_are_refused(wrong):
    with pytest.raises(OptionError, match="threshold must be"):
        OutlierPolicy(threshold=wrong)


def test_sums_that_32_bits_cannot_hold_are_refused():
    state(columns=MOST_RELATIVE_COLUMNS)
    state(6.0, columns=MOST_RELATIVE_COLUMNS + 1)
    with pytest.raises(OptionError, match="is defined for up to 131071 input channels, not 131072"):
        state(columns=MOST_RELATIVE_COLUMNS + 1)
