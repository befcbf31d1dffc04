"""Inputs on which every kernel provider must agree with the reference: the edge cases of the semantics.

A case builds plain tensors; `learn` and `product` run one through a provider, so that each provider's
test file only names itself and its device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixq_compile import ops
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.activated_linear import activated_linear
from mixq_compile.ops.outlier_state import STATE_FIELDS, OutlierState
from mixq_compile.ops.weight_codes import dequantize_weight, quantize_weight
from mixq_compile.scheme import WeightRecipe

THRESHOLD = 6.0
POLICIES = ("exact", "lazy", "frozen", "static", "per_call")


@dataclass
class OnlineCase:
    """Calls on one outlier state, one after the other."""

    inputs: list[Tensor]
    capacity: int = 16
    threshold: float | str = THRESHOLD
    bits: int = 8
    known: list[int] = field(default_factory=list)
    freeze_before_call: int | None = None


OnlineBuilder = Callable[[torch.dtype], OnlineCase]
ONLINE_CASES: dict[str, OnlineBuilder] = {}


def _online(builder: OnlineBuilder) -> OnlineBuilder:
    ONLINE_CASES[builder.__name__] = builder
    return builder


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).clamp_(-4, 4) * scale


def _planted(rows: int, columns: int, outliers: list[int], size: float = 20.0, seed: int = 0) -> Tensor:
    x = _normal(rows, columns, seed=seed)
    # Magnitudes differ and exceed the threshold, so that which columns stay is decided by value.
    for place, column in enumerate(outliers):
        x[place % rows, column] = (size + place) * (-1) ** place
    return x


@_online
def one_row(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(1, 40, [3]).to(dtype)])


@_online
def ragged_columns(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(5, 171, [0, 77, 170]).to(dtype)])


@_online
def no_outliers(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_normal(7, 64).to(dtype), _normal(3, 64, seed=1).to(dtype)])


@_online
def zero_and_subnormal_rows(dtype: torch.dtype) -> OnlineCase:
    x = _planted(6, 48, [5, 6])
    x[1] = 0
    x[2] = 1e-40
    x[3] = 2.0**-97
    return OnlineCase([x.to(dtype)])


@_online
def exactly_the_threshold(dtype: torch.dtype) -> OnlineCase:
    x = _normal(4, 33)
    x[2, 7] = THRESHOLD
    x[3, 9] = -THRESHOLD
    return OnlineCase([x.to(dtype)])


@_online
def every_column_an_outlier(dtype: torch.dtype) -> OnlineCase:
    x = _normal(3, 32)
    x[1] = torch.arange(32) + 10.0
    return OnlineCase([x.to(dtype), x.to(dtype)], capacity=32)


@_online
def exactly_full(dtype: torch.dtype) -> OnlineCase:
    x = _planted(6, 80, list(range(0, 80, 5)))
    return OnlineCase([x.to(dtype), x.to(dtype)])


@_online
def more_than_the_capacity(dtype: torch.dtype) -> OnlineCase:
    x = _planted(6, 80, list(range(0, 80, 3)))
    return OnlineCase([x.to(dtype), x.to(dtype)])


@_online
def equal_maxima_beyond_the_capacity(dtype: torch.dtype) -> OnlineCase:
    x = _normal(4, 70)
    x[1, 3:40] = 9.0
    x[2, 50:54] = 12.0
    return OnlineCase([x.to(dtype)])


@_online
def not_finite(dtype: torch.dtype) -> OnlineCase:
    x = _planted(6, 50, [4, 30])
    x[0, 1] = torch.nan
    x[1, 30] = torch.inf
    x[2, 4] = -torch.inf
    x[5, 20] = 40.0
    return OnlineCase([x.to(dtype), x.to(dtype)])


@_online
def nothing_is_finite(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([torch.full((3, 20), torch.nan).to(dtype)])


@_online
def an_absurd_row_among_good_ones(dtype: torch.dtype) -> OnlineCase:
    x = _planted(6, 50, [4, 30])
    x[2] = 3e37
    x[3, 41] = 1e30
    x[3, 8] = -25.0
    return OnlineCase([x.to(dtype), x.to(dtype)])


@_online
def every_row_absurd(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(3, 40, [2], size=1e31).fill_(1e30).to(dtype)] * 2, known=[7, 9])


@_online
def an_absurd_value_in_a_known_column(dtype: torch.dtype) -> OnlineCase:
    x = _planted(4, 40, [7, 30])
    x[2, 7] = 3e37
    return OnlineCase([x.to(dtype)] * 2, known=[7])


def _around_the_teaching_limit(dtype: torch.dtype, bits: int) -> OnlineCase:
    limit = torch.tensor((2 ** (bits - 1) - 1) * 2.0**23).to(dtype)
    below = torch.nextafter(limit, torch.zeros_like(limit))
    x = _planted(4, 40, [7]).to(dtype)
    x[1, 20], x[2, 30], x[3, 35] = limit, below, -limit
    return OnlineCase([x] * 2, bits=bits)


@_online
def around_the_teaching_limit(dtype: torch.dtype) -> OnlineCase:
    return _around_the_teaching_limit(dtype, bits=8)


@_online
def around_the_teaching_limit_of_four_bits(dtype: torch.dtype) -> OnlineCase:
    return _around_the_teaching_limit(dtype, bits=4)


@_online
def grows_then_evicts(dtype: torch.dtype) -> OnlineCase:
    inputs = [
        _planted(4, 96, [10, 20], size=20, seed=0),
        _planted(4, 96, [5, 10, 90], size=30, seed=1),
        _planted(4, 96, list(range(30, 60, 2)), size=25, seed=2),
        _planted(4, 96, [0, 1, 2, 3], size=90, seed=3),
        _planted(4, 96, [20, 21], size=7, seed=4),
    ]
    return OnlineCase([x.to(dtype) for x in inputs])


@_online
def starts_calibrated(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(4, 96, [2, 40, 41]).to(dtype)] * 2, capacity=48, known=[7, 40])


@_online
def frozen_midway(dtype: torch.dtype) -> OnlineCase:
    inputs = [_planted(4, 64, [2]).to(dtype), _planted(4, 64, [9]).to(dtype)]
    return OnlineCase(inputs, freeze_before_call=1)


@_online
def three_dimensions(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(6, 40, [1, 39]).reshape(2, 3, 40).to(dtype)])


@_online
def not_contiguous(dtype: torch.dtype) -> OnlineCase:
    wide = _planted(12, 80, [6, 30]).to(dtype)
    transposed = _planted(40, 6, [2]).to(dtype).T
    return OnlineCase([wide[::2, :40], transposed])


@_online
def four_bits(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(5, 64, [8, 50]).to(dtype)], bits=4)


@_online
def many_rows(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(34, 140, [8, 50, 139]).to(dtype)])


@_online
def a_multiple_of_the_mean(dtype: torch.dtype) -> OnlineCase:
    first, second = _planted(7, 171, [3, 90, 170]), _planted(9, 171, [3, 50], size=60.0, seed=1)
    # Each row is judged by its own size: a small row's outlier counts as a large one's does.
    return OnlineCase(
        [(first * 2.0**-7).to(dtype), (second * 2.0**5).to(dtype)], threshold="8x", known=[1, 90]
    )


@_online
def a_multiple_beyond_the_capacity(dtype: torch.dtype) -> OnlineCase:
    x = _planted(30, 300, list(range(0, 300, 7)), size=40.0)
    return OnlineCase([x[:9].to(dtype), x.to(dtype), (x * 3).to(dtype)], threshold="6x")


@_online
def multiples_of_rows_that_have_no_mean(dtype: torch.dtype) -> OnlineCase:
    x = _planted(9, 48, [5, 6], size=40.0)
    x[1], x[2], x[3] = 0, 1e-40, 2.0**-97
    x[4, 9], x[5, 9], x[6, 6] = torch.nan, torch.inf, -torch.inf
    x[7], x[7, 11] = 3e37, 1e36
    x[8], x[8, 5] = 2.0**-100, 2.0**-90
    return OnlineCase([x.to(dtype), x.to(dtype)], threshold="6x", known=[6])


@_online
def multiples_at_four_bits(dtype: torch.dtype) -> OnlineCase:
    return OnlineCase([_planted(5, 50, [8, 20]).to(dtype)], threshold="9.5x", bits=4)


def outlier_state(case: OnlineCase, device: torch.device | str) -> OutlierState:
    """The state that a case starts from."""
    columns = case.inputs[0].shape[-1]
    state = OutlierState.create(columns, case.capacity, case.threshold, device)
    if case.known:
        state.preload(case.known)
    return state


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on the device with the same strides: a case may be about them."""
    target = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return target.copy_(tensor)


def learn(case: OnlineCase, kernel: str, miss: str, device: torch.device | str) -> list[dict[str, Tensor]]:
    """After each call of the case: what the operator returned, and the state, on the CPU."""
    state = outlier_state(case, device)
    seen = []
    for place, x in enumerate(case.inputs):
        if place == case.freeze_before_call:
            state.freeze()
        there = moved(x, device)
        outputs = ops.quantize_online(there, *state.buffers(), f"int{case.bits}", miss, 0, kernel)
        assert torch.equal(there.cpu().nan_to_num(), x.nan_to_num()), "the input was changed"
        result = dict(zip(("codes", "scale", "outliers", "used"), outputs, strict=True))
        result |= dict(zip(STATE_FIELDS, state.buffers(), strict=True))
        seen.append({name: value.cpu().clone() for name, value in result.items()})
    return seen


def quantize_fixed(case: OnlineCase, kernel: str, device: torch.device | str) -> list[dict[str, Tensor]]:
    """What `quantize` returns for each input of the case with its known columns, and with no slots."""
    state = outlier_state(case, device)
    empty = OutlierState.create(case.inputs[0].shape[-1], 0, case.threshold, device)
    seen = []
    for x in case.inputs:
        for used in (state, empty):
            outputs = ops.quantize(
                moved(x, device), used.index, used.column_slot, used.counters, f"int{case.bits}", 0, kernel
            )
            names = ("codes", "scale", "outliers")
            seen.append({name: value.cpu() for name, value in zip(names, outputs, strict=True)})
    return seen


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Fails where any tensor of any call differs in a single bit (NaN equals NaN)."""
    for call, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, value in theirs.items():
            message = f"{name} of call {call}"
            assert mine[name].dtype == value.dtype, message
            torch.testing.assert_close(
                mine[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, m=message: f"{m}: {text}"
            )


@dataclass(frozen=True)
class LinearCase:
    """The shape of one quantized linear and of its input."""

    rows: int
    in_features: int
    out_features: int
    outliers: int = 3
    capacity: int = 16
    weight_bits: int = 8
    bias: bool = True
    originals: bool = False
    leading: tuple[int, ...] = ()
    aligned_weight: bool = True


LINEAR_CASES: dict[str, LinearCase] = {
    "one_row": LinearCase(1, 64, 48),
    "no_rows": LinearCase(0, 64, 48),
    "ragged_everything": LinearCase(5, 83, 37),
    "ragged_beyond_a_tile": LinearCase(67, 147, 133),
    "no_slots": LinearCase(9, 64, 32, outliers=0, capacity=0),
    "no_outliers": LinearCase(9, 64, 32, outliers=0),
    "full": LinearCase(9, 96, 32, outliers=32, capacity=32),
    "many_slots": LinearCase(9, 160, 32, outliers=100, capacity=112),
    "no_bias": LinearCase(4, 64, 32, bias=False),
    "originals": LinearCase(8, 64, 40, originals=True),
    "three_dimensions": LinearCase(6, 64, 40, leading=(2, 3)),
    "four_bits": LinearCase(7, 96, 40, weight_bits=4, originals=True),
    "four_bits_ragged": LinearCase(7, 83, 37, weight_bits=4),
    "unaligned_weight": LinearCase(6, 83, 40, aligned_weight=False),
}


@dataclass
class Linear:
    """A case made into tensors."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    original: Tensor
    state: OutlierState
    cached_index: Tensor
    outlier_weight: Tensor


def linear(case: LinearCase, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Linear:
    """Random tensors of a case; its outlier columns are spread over the input."""
    spread = [place * case.in_features // max(case.outliers, 1) for place in range(case.outliers)]
    x = _planted(max(case.rows, 1), case.in_features, [], seed=seed)[: case.rows]
    x[:, spread] *= 20.0
    x = x.reshape(*case.leading, case.in_features) if case.leading else x
    weight = _normal(case.out_features, case.in_features, seed=seed + 1, scale=0.1).to(dtype)
    codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(case.weight_bits)))
    if not case.aligned_weight:
        codes = codes.contiguous()
    bias = _normal(case.out_features, seed=seed + 2).to(dtype) if case.bias else None
    state = OutlierState.create(case.in_features, case.capacity, THRESHOLD, device)
    state.preload(spread)
    return Linear(
        x=x.to(device, dtype),
        codes=moved(codes, device),
        scale=scale.to(device),
        bias=None if bias is None else bias.to(device),
        original=weight.to(device) if case.originals else weight.new_empty(0).to(device),
        state=state,
        cached_index=torch.full((case.capacity,), -1, dtype=torch.int32, device=device),
        outlier_weight=torch.zeros(case.out_features, case.capacity, dtype=dtype, device=device),
    )


def refresh(tensors: Linear, kernel: str, small_m: int = 0) -> None:
    """Fetches the outlier weight of the state's columns."""
    ops.refresh_outlier_weights(
        tensors.x, tensors.state.index, tensors.state.counters, [tensors.cached_index],
        [tensors.outlier_weight], [tensors.codes], [tensors.scale], [tensors.original], small_m, kernel,
    )  # fmt: skip


def product(tensors: Linear, kernel: str, small_m: int = 0, bits: int = 8) -> Tensor:
    """The linear through a provider's quantize, refresh and mixed_linear."""
    state = tensors.state
    codes, scale, outliers = ops.quantize(
        tensors.x, state.index, state.column_slot, state.counters, f"int{bits}", small_m, kernel
    )
    if state.capacity:
        refresh(tensors, kernel, small_m)
    return ops.mixed_linear(
        tensors.x, codes, scale, outliers, state.counters, tensors.codes, tensors.scale,
        tensors.outlier_weight, tensors.bias, small_m, kernel,
    )  # fmt: skip


def activated_product(
    tensors: Linear, kernel: str, function: str, gated: bool = False, small_m: int = 0
) -> Tensor:
    """The linear with an activation function, through a provider."""
    state = tensors.state
    codes, scale, outliers = ops.quantize(
        tensors.x, state.index, state.column_slot, state.counters, "int8", small_m, kernel
    )
    if state.capacity:
        refresh(tensors, kernel, small_m)
    return activated_linear(
        tensors.x, codes, scale, outliers, state.counters, tensors.codes, tensors.scale,
        tensors.outlier_weight, tensors.bias, function, gated, small_m, kernel,
    )  # fmt: skip


def expected_activation(product: Tensor, function: str, gated: bool = False) -> Tensor:
    """The function of a float64 product."""
    functions = {**vars(torch.nn.functional), "gelu_tanh": torch.nn.GELU(approximate="tanh")}
    gates, values = product.chunk(2, dim=-1) if gated else (product, 1.0)
    return functions[function](gates) * values


def unfused_product(tensors: Linear, kernel: str) -> Tensor:
    """The same through `mixed_gemm` and `dequantize`."""
    state = tensors.state
    codes, scale, outliers = ops.quantize(
        tensors.x, state.index, state.column_slot, state.counters, "int8", 0, kernel
    )
    if state.capacity:
        refresh(tensors, kernel)
    accumulator, outlier_product = ops.mixed_gemm(
        codes, outliers, state.counters, tensors.codes, tensors.outlier_weight, kernel
    )
    return ops.dequantize(tensors.x, accumulator, outlier_product, scale, tensors.scale, tensors.bias, kernel)


def expected_weight_only(tensors: Linear) -> Tensor:
    """The weight-only product in float64."""
    weight = dequantize_weight(tensors.codes, tensors.scale, tensors.x.shape[-1]).double()
    result = tensors.x.double() @ weight.T
    return result if tensors.bias is None else result + tensors.bias.double()


def expected_product(tensors: Linear, bits: int = 8) -> Tensor:
    """The same in float64 from the reference's codes: what only rounding may separate from a provider."""
    state = tensors.state
    codes, scale, outliers = ops.quantize(
        tensors.x, state.index, state.column_slot, state.counters[:1], f"int{bits}", 0, "ref"
    )
    used = int(state.counters[0])
    columns = state.index[:used].long()
    weight = dequantize_weight(tensors.codes, tensors.scale, tensors.x.shape[-1]).double()
    kept = tensors.original.double() if tensors.original.numel() else weight
    kept_columns = kept[:, columns].to(tensors.outlier_weight.dtype).double()
    result = codes.double() * scale.double()[..., None] @ weight.T
    result = result + outliers[..., :used].double() @ kept_columns.T
    return result if tensors.bias is None else result + tensors.bias.double()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """What one rounding to dtype, and fp32 arithmetic before it, may differ by."""
    unit = {torch.float32: 2e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    return {"rtol": unit, "atol": unit}


def check_refresh_follows_the_state(kernel: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Replaced, dropped and added columns, for two readers of one state with different sources."""
    in_features, capacity = 96, 80
    state = OutlierState.create(in_features, capacity, THRESHOLD, device)
    readers = [
        linear(
            LinearCase(4, in_features, size, capacity=capacity, weight_bits=bits, originals=kept),
            dtype,
            device,
        )
        for size, bits, kept in ((40, 8, True), (33, 4, False))
    ]
    for columns in ([3, 50, 7], list(range(4, 74)), [1, 5], []):
        state.reset()
        state.index[: len(columns)] = torch.tensor(columns, dtype=torch.int32)
        state.counters[0] = len(columns)
        ops.refresh_outlier_weights(
            readers[0].x, state.index, state.counters, [each.cached_index for each in readers],
            [each.outlier_weight for each in readers], [each.codes for each in readers],
            [each.scale for each in readers], [each.original for each in readers], 0, kernel,
        )  # fmt: skip
        for each in readers:
            weight = dequantize_weight(each.codes, each.scale, in_features)
            kept = each.original if each.original.numel() else weight
            end = min(capacity, -(-len(columns) // 64) * 64)
            assert torch.equal(each.outlier_weight[:, : len(columns)], kept[:, columns].to(dtype))
            assert not each.outlier_weight[:, len(columns) : end].any()
            assert each.cached_index[:end].tolist() == columns + [-1] * (end - len(columns))


def check_not_finite_rows(kernel: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """NaN and infinity stay in their rows."""
    tensors = linear(LinearCase(6, 64, 32), dtype, device)
    clean = product(tensors, kernel)
    tensors.x[1, 5] = torch.nan
    tensors.x[3, 0] = torch.inf
    spoilt = product(tensors, kernel)
    assert not spoilt[[1, 3]].isfinite().any()
    assert torch.equal(spoilt[[0, 2, 4, 5]], clean[[0, 2, 4, 5]])


def check_absurd_rows_teach_nothing(kernel: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """A finite row of 3e37 leaves state and results of the rows beside it as they are without it."""
    good = _planted(5, 64, [9, 40]).to(dtype)
    absurd = torch.full((1, 64), 3e37).to(dtype)
    assert absurd.isfinite().all(), "choose a dtype that holds the absurd magnitude"
    for bits in (8, 4):
        for miss in ("exact", "lazy", "frozen"):
            seen = []
            for inputs in ([good, good], [torch.cat((good[:2], absurd, good[2:]))] * 2):
                case = OnlineCase(inputs, known=[3], bits=bits)
                seen.append(learn(case, kernel, miss, device))
            for call, (without, beside) in enumerate(zip(*seen, strict=True)):
                for name, value in without.items():
                    found = beside[name]
                    if name in ("codes", "scale", "outliers"):
                        assert (found[2] != 0).any() or name == "outliers", f"{name} of the absurd row"
                        found = found[[0, 1, 3, 4, 5]]
                    assert torch.equal(found, value), (
                        f"an absurd row changed {name} of call {call} ({miss}, {bits} bits)"
                    )
                assert without["index"][: int(without["counters"][0])].tolist() == [3, 9, 40]
            alone = learn(OnlineCase([absurd], bits=bits), kernel, miss, device)[0]
            assert alone["counters"].tolist() == [0, 0, 0, 0], "absurd rows alone took slots"
            assert alone["effective_threshold"].tolist() == [THRESHOLD]
            assert alone["codes"].abs().eq(2 ** (bits - 1) - 1).all(), (
                "an absurd row is quantized as any other"
            )


def check_padding_teaches_nothing(
    kernel: str, miss: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Huge rows that a mask takes out leave state and results of the rows beside them as they are without."""
    good = [_planted(6, 96, [9, 40]).to(dtype), _planted(6, 96, [9, 71, 5], seed=1).to(dtype)]
    kept = torch.tensor([True, False, True, True, False, True, True, True, False])
    padding = torch.full((3, 96), 900.0).to(dtype)
    padding[2, 7] = torch.nan
    results = []
    for padded in (False, True):
        state = OutlierState.create(96, 16, THRESHOLD, device)
        state.preload([3])
        seen = []
        for rows in good:
            x, mask = rows, None
            if padded:
                x = torch.empty(9, 96, dtype=dtype)
                x[kept], x[~kept], mask = rows, padding, kept.to(device)
            outputs = ops.quantize_online(moved(x, device), *state.buffers(), "int8", miss, 0, kernel, mask)
            call = dict(zip(("codes", "scale", "outliers", "used"), outputs, strict=True))
            call = {name: value.cpu() for name, value in call.items()}
            if padded:
                codes = call["codes"][~kept]
                assert (codes[:2] != 0).any(dim=1).all(), "padding is quantized as all other rows are"
                call |= {name: call[name][kept] for name in ("codes", "scale", "outliers")}
            call |= {name: getattr(state, name).cpu().clone() for name in STATE_FIELDS}
            seen.append(call)
        results.append(seen)
    if miss in ("exact", "lazy"):
        assert sorted(state.columns()) == [3, 5, 9, 40, 71], "the case learns nothing"
    assert_same(results[1], results[0])


def check_large_sums(
    kernel: str,
    device: torch.device | str,
    rows: int = 1024,
    in_features: int = 2048,
    out_features: int = 5120,
) -> None:
    """int32 sums beyond 65504 with fp16 results: where QUIK's fused dequantization gives NaN."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, in_features), generator=generator, dtype=torch.int8)
    weight = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    codes[0], weight[0] = 7, 7  # a sum of 100352
    scale = torch.rand(rows, generator=generator) * 1e-2
    weight_scale = torch.rand(out_features, generator=generator) * 1e-2
    expected = codes.double() @ weight.double().T * scale.double()[:, None] * weight_scale.double()
    found = ops.mixed_linear(
        torch.zeros(rows, in_features, dtype=torch.float16, device=device), codes.to(device),
        scale.to(device), torch.zeros(rows, 0, dtype=torch.float16, device=device),
        torch.zeros(1, dtype=torch.int32, device=device), weight.to(device), weight_scale.to(device),
        torch.zeros(out_features, 0, dtype=torch.float16, device=device), None, 0, kernel,
    )  # fmt: skip
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2.0**-10, atol=1e-6)
