"""`quantized_linear` on the CPU against the reference: codes may differ by one, where a value is rounded."""

import pytest
import torch

from mixq_compile.errors import MixqError
from mixq_compile.formats import TensorFormat
from mixq_compile.ops import OutlierState, quantize, quantized_linear
from mixq_compile.ops.providers import KernelQuery, rejections
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import WeightRecipe


@pytest.fixture(autouse=True)
def needs_the_cpu_kernels():
    chosen, refused = rejections(KernelQuery("quantized_linear", torch.device("cpu"), torch.float32))
    if chosen is None or chosen.name != "cpu":
        pytest.skip(f"the CPU kernels are not available: {refused}")


def operands(rows, in_features, out_features, dtype, planted=True, bias=True):
    torch.manual_seed(rows + in_features)
    x = torch.randn(rows, in_features)
    x[:, 3] *= 10
    weight = torch.randn(out_features, in_features) * 0.1
    if planted:
        weight[5] *= 12
    weight_codes, weight_scale = quantize_weight(weight, WeightRecipe(TensorFormat(8)))
    state = OutlierState.create(in_features, 16, 6.0, "cpu")
    state.preload([3])
    outlier_weight = torch.zeros(out_features, 16, dtype=dtype)
    outlier_weight[:, 0] = weight[:, 3]
    codes, scale, outliers = quantize(
        x.to(dtype), state.index, state.column_slot, state.counters, "int8", 0, "ref"
    )
    addition = torch.randn(out_features).to(dtype) if bias else None
    return codes, (scale, outliers, state.counters, weight_codes, weight_scale, outlier_weight, addition)


def both(codes, rest, out_features, activation, miss="exact"):
    results = {}
    for kernel in ("ref", "cpu"):
        state = OutlierState.create(out_features, 16, 6.0, "cpu")
        results[kernel] = (
            *quantized_linear(codes, *state.buffers(), *rest, activation, "int8", miss, kernel),
            state,
        )
    return results["ref"], results["cpu"]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 96), (51, 77)])
def test_equals_the_reference(rows, in_features, out_features, dtype, activation):
    codes, rest = operands(rows, in_features, out_features, dtype)
    wanted, found = both(codes, rest, out_features, activation)
    assert found[4].columns() == wanted[4].columns(), "other outlier columns"
    if rows == 300:
        assert 5 in found[4].columns(), "the planted column was not found"
    # A value rounded to bf16 before quantization differs by half a step of bf16: 1/256 of itself.
    steps = 1 if dtype == torch.float32 else 2
    if rows:
        assert int((found[0].int() - wanted[0].int()).abs().max()) <= steps
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found[1], wanted[1], rtol=tolerance, atol=0)
        torch.testing.assert_close(
            found[2].float(), wanted[2].float(), rtol=2 * tolerance, atol=2 * tolerance
        )
    assert int(found[3]) == int(wanted[3])


@pytest.mark.parametrize("miss", ["lazy", "frozen", "per_call"])
def test_follows_the_miss_policy(miss):
    codes, rest = operands(300, 64, 96, torch.float32)
    wanted, found = both(codes, rest, 96, "gelu", miss)
    assert found[4].columns() == wanted[4].columns()
    assert int((found[0].int() - wanted[0].int()).abs().max()) <= 1


def test_a_row_that_is_not_finite_stays_alone():
    codes, (scale, *rest) = operands(300, 64, 96, torch.float32, planted=False)
    scale[7] = float("nan")
    wanted, found = both(codes, (scale, *rest), 96, "gelu")
    assert found[1][7].isnan()
    assert found[1].isnan().sum() == wanted[1].isnan().sum() == 1


def test_an_absurd_row_of_the_result_teaches_nothing():
    codes, (scale, *rest) = operands(300, 64, 96, torch.float32)
    scale[7] = float("nan")
    _, without = both(codes, (scale, *rest), 96, "none")
    scale[7] = 1e30
    wanted, found = both(codes, (scale, *rest), 96, "none")
    assert found[1][7] > 1e25, "the row is quantized as any other"
    assert found[4].columns() == wanted[4].columns() == without[4].columns(), "an absurd row took slots"


def test_repeats_are_identical():
    codes, rest = operands(300, 64, 96, torch.float32)
    first, second = (both(codes, rest, 96, "gelu")[1] for _ in range(2))
    for one, other in zip(first[:4], second[:4], strict=True):
        assert torch.equal(one, other)


def test_an_unknown_activation_is_an_error():
    codes, rest = operands(4, 64, 96, torch.float32)
    state = OutlierState.create(96, 16, 6.0, "cpu")
    with pytest.raises((MixqError, KeyError), match="swish"):
        quantized_linear(codes, *state.buffers(), *rest, "swish", "int8", "exact", "cpu")
