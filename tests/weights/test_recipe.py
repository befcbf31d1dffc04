"""Recipes: texts, the tensors of a weight, their bytes and how they are made."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from other_defaults import DEFAULTS, assert_unchanged
from torch import Tensor

from mixq_compile.errors import OptionError, StatisticsError
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import SOLVERS, LowRank, OutlierPolicy, QuantScheme, WeightRecipe
from mixq_compile.weights.quantized_weight import QuantizedWeight
from mixq_compile.weights.recipe import empty, make, nbytes, parts

FORMATS = ("int8", "int4", "int2", "int4/16", "uint4/16", "uint8", "uint2/7", "mxint4/16", "mxint2/16")
RECIPES = [
    *(f"{fmt} absmax" for fmt in FORMATS),
    *(f"{fmt} clip rank=3 sums" for fmt in FORMATS),
    "int4 absmax rank=3 weighting=activations",
]
INPUTS = {"mean_magnitude": torch.linspace(0.1, 3, 45)}


def weight(rows: int = 37, columns: int = 45) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def made(text: str, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    return make(WeightRecipe.parse(text), weight(), dtype, INPUTS)


recipes = st.builds(
    WeightRecipe,
    format=st.sampled_from(FORMATS).map(TensorFormat.parse),
    solver=st.sampled_from(SOLVERS),
    low_rank=st.none() | st.builds(LowRank, st.integers(1, 999), st.sampled_from(["none", "activations"])),
    sums=st.booleans(),
)


@given(recipes)
def test_a_recipe_is_its_text(recipe: WeightRecipe) -> None:
    assert WeightRecipe.parse(str(recipe)) == recipe


def test_texts_of_recipes() -> None:
    fmt = TensorFormat.parse("uint4/128")
    assert str(WeightRecipe(TensorFormat(4, 64), "clip")) == "int4/64 clip"
    assert str(WeightRecipe(fmt, low_rank=LowRank(8))) == "uint4/128 absmax rank=8"
    full = WeightRecipe(fmt, "clip", LowRank(8, "activations"), sums=True)
    assert str(full) == "uint4/128 clip rank=8 weighting=activations sums"


@pytest.mark.parametrize(
    "text",
    ["int4", "", "int4 ", "int4 clip ", "int4  clip", "int4 clip rank=0", "int4 clip rank=08",
     "int4 clip rank=", "int4 clip sums rank=2", "int4 clip weighting=activations",
     "int4 clip rank=2 weighting=none", "int4 clip sums sums", "int4 clip rank=2 rank=3"],
)  # fmt: skip
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(OptionError, match="'uint4/128 absmax rank=8'"):
        WeightRecipe.parse(text)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5])
def test_ranks_are_counts(rank: int) -> None:
    with pytest.raises(OptionError, match="rank 1 or more"):
        LowRank(rank)


def test_unknown_weightings_are_refused() -> None:
    with pytest.raises(OptionError, match="Did you mean 'activations'"):
        LowRank(2, "activation")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", RECIPES)
def test_parts_say_what_make_makes_and_empty_allocates(text: str) -> None:
    recipe, expected = WeightRecipe.parse(text), parts(WeightRecipe.parse(text), 37, 45, torch.bfloat16)
    assert tuple(expected) == recipe.operands
    here = made(text).named()
    for found in (here, *(empty(recipe, 37, 45, torch.bfloat16, on).named() for on in ("cpu", "meta"))):
        assert {name: (tuple(t.shape), t.dtype) for name, t in found.items()} == expected
        assert {name: t.stride() for name, t in found.items()} == {n: t.stride() for n, t in here.items()}
    held = sum(t.stride(0) * t.shape[0] * t.element_size() for t in here.values())
    assert nbytes(recipe, 37, 45, torch.bfloat16) == held


@pytest.mark.parametrize(
    ("text", "bytes_of_all"),
    [
        ("int8 absmax", 37 * 48 + 37 * 4),
        ("int4 absmax", 37 * 32 + 37 * 4),
        ("uint4/16 clip", 37 * 32 + 37 * 3 * 5),
        ("mxint4/16 absmax", 37 * 32 + 37 * 3),
        ("int2 absmax rank=3 sums", 37 * 16 + 37 * 4 + 37 * 4 + 2 * 3 * (37 + 45)),
    ],
)
def test_bytes_include_the_padding_of_rows(text: str, bytes_of_all: int) -> None:
    assert nbytes(WeightRecipe.parse(text), 37, 45, torch.float16) == bytes_of_all


@pytest.mark.parametrize("text", ["int8 absmax", "int4 absmax", "int4 clip"])
def test_operators_of_rows_get_the_same_codes(text: str) -> None:
    codes, scale = quantize_weight(weight(), WeightRecipe.parse(text))
    assert torch.equal(codes, made(text).codes)
    assert torch.equal(scale, made(text).scale)


@pytest.mark.parametrize("text", ["int4 absmax rank=2", "int8 absmax sums"])
def test_operators_of_rows_refuse_what_they_have_no_operand_for(text: str) -> None:
    with pytest.raises(OptionError, match="takes codes and scales alone"):
        quantize_weight(weight(), WeightRecipe.parse(text))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_dequantized_weight_is_near(fmt: str) -> None:
    """Within the largest step of a row, which is its range by the number of steps."""
    format = TensorFormat.parse(fmt)
    found = made(f"{fmt} absmax").dequantized(format, 45)
    reach = weight().abs().amax(dim=1, keepdim=True) * (4 if format.scale == "power_of_two" else 2)
    assert found.dtype == torch.float32
    assert bool(((found - weight()).abs() <= reach / (2**format.bits - 1)).all())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("weighting", ["", " weighting=activations"])
def test_the_whole_error_at_full_rank_gives_the_weight_back(fmt: str, weighting: str) -> None:
    whole = made(f"{fmt} absmax rank=99{weighting}", torch.float32)
    torch.testing.assert_close(whole.dequantized(TensorFormat.parse(fmt), 45), weight(), rtol=0, atol=2e-5)


def test_low_rank_serves_as_two_products_beside_the_rounded_weight() -> None:
    text, fmt = "int4/16 absmax rank=5", TensorFormat.parse("int4/16")
    found, x = made(text, torch.float32), torch.randn(6, 45, generator=torch.Generator().manual_seed(1))
    assert found.left is not None
    assert found.right is not None
    product = x @ found.rounded(fmt, 45).T + (x @ found.left) @ found.right
    torch.testing.assert_close(x @ found.dequantized(fmt, 45).T, product, rtol=0, atol=1e-4)
    assert torch.equal(found.rounded(fmt, 45), made("int4/16 absmax").dequantized(fmt, 45))


@pytest.mark.parametrize("fmt", ["int8", "uint4", "uint4/16", "mxint4/16"])
def test_sums_correct_a_shifted_activation(fmt: str) -> None:
    """`Σ (q - z)·w = Σ q·w - z·Σ_g scale·sums`, which is what the sums are for."""
    format, found = TensorFormat.parse(fmt), made(f"{fmt} absmax sums")
    assert found.sums is not None
    exact, shift = found.rounded(format, 45).double(), 5
    q = torch.randint(-8, 8, (3, 45), generator=torch.Generator().manual_seed(1)).double()
    steps = found.scale.double()
    if format.scale == "power_of_two":
        steps = torch.exp2(steps - 127 - 3)
    sums = steps * found.sums.double()
    correction = shift * (sums if sums.dim() == 1 else sums.sum(dim=1))
    torch.testing.assert_close(q @ exact.T - correction, (q - shift) @ exact.T, rtol=0, atol=1e-4)


def test_weighting_by_activations_needs_their_statistics() -> None:
    recipe = WeightRecipe.parse("int4 absmax rank=3 weighting=activations")
    with pytest.raises(StatisticsError, match="needs the mean_magnitude of its linear's inputs"):
        make(recipe, weight(), torch.float32)
    for wrong in (torch.ones(44), torch.full((45,), torch.nan)):
        with pytest.raises(StatisticsError, match="45 finite numbers"):
            make(recipe, weight(), torch.float32, {"mean_magnitude": wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("text", ["int4/16 clip", "uint4 absmax", "mxint4/16 absmax"])
def test_weights_of_any_dtype_and_strides(text: str, dtype: torch.dtype) -> None:
    given_weight = torch.nn.Parameter(weight(45, 37).to(dtype))
    recipe = WeightRecipe.parse(text)
    found = make(recipe, given_weight.t(), dtype).named()
    plain = make(recipe, given_weight.detach().float().t().contiguous(), dtype).named()
    for name, tensor in found.items():
        assert not tensor.requires_grad
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("text", RECIPES[-4:])
def test_other_defaults_of_torch_change_no_bit(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixq_compile.weights.low_rank.EXACT_SIZE", 0)
    given_weight, recipe = weight(), WeightRecipe.parse(text)
    assert_unchanged(name, lambda: make(recipe, given_weight, torch.float32, INPUTS).named())


def test_named_tensors_are_a_weight_again() -> None:
    whole = made("uint4/16 clip rank=3 sums")
    assert list(whole.named()) == [
        "weight_codes", "weight_scale", "weight_zero", "weight_sums", "left", "right",
    ]  # fmt: skip
    again = QuantizedWeight.from_named(whole.named())
    assert all(again.named()[name] is tensor for name, tensor in whole.named().items())
    assert list(made("int8 absmax").named()) == ["weight_codes", "weight_scale"]


@pytest.mark.parametrize("low_rank", [None, LowRank(8), LowRank(32, "activations")])
@pytest.mark.parametrize("activation", ["int8", "uint4", None])
def test_schemes_pass_it_on_and_round_trip(low_rank: LowRank | None, activation: str | None) -> None:
    format = None if activation is None else TensorFormat.parse(activation)
    scheme = QuantScheme("mine", "one", TensorFormat.parse("int4/64"), format, low_rank=low_rank)
    assert QuantScheme.from_json(json.loads(json.dumps(scheme.to_json()))) == scheme
    assert scheme.recipe == WeightRecipe(scheme.weight, "absmax", low_rank, sums=activation == "uint4")


def test_a_scheme_written_before_low_rank_is_read() -> None:
    data = QuantScheme("mine", "one", INT8, INT8).to_json()
    del data["low_rank"]
    assert QuantScheme.from_json(data).low_rank is None


def test_a_low_rank_part_beside_outlier_columns_is_refused() -> None:
    with pytest.raises(OptionError, match="would be added twice"):
        QuantScheme("mine", "one", INT8, INT8, OutlierPolicy(), low_rank=LowRank(4))


def test_zero_points_of_activations_learn_no_columns() -> None:
    activation = TensorFormat.parse("uint8")
    with pytest.raises(OptionError, match="its policy must be 'static', not 'exact'"):
        QuantScheme("mine", "one", INT8, activation, OutlierPolicy())
    assert QuantScheme("mine", "one", INT8, activation, OutlierPolicy(miss="static")).recipe.sums


def test_zero_points_of_activations_beside_shared_exponents_are_refused() -> None:
    activation = TensorFormat.parse("uint8")
    with pytest.raises(OptionError, match="mxint4/16 has shared exponents"):
        QuantScheme("mine", "one", TensorFormat.parse("mxint4/16"), activation)
    with pytest.raises(OptionError, match="mxint4/16 has shared exponents"):
        LinearRecipe.parse("weight=mxint4/16 absmax sums; activation=uint8; outliers=static inf")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("solver", ["absmax", "clip"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_gpu_makes_the_same_bits(fmt: str, solver: str) -> None:
    """Sums of errors are ordered otherwise there, so that a search may choose a neighbour for one scale."""
    recipe = WeightRecipe.parse(f"{fmt} {solver} sums")
    here, there = (
        make(recipe, weight(300, 500).to(device), torch.float32).named() for device in ("cpu", "cuda")
    )
    if solver == "absmax":
        for name, tensor in there.items():
            assert torch.equal(tensor.cpu(), here[name]), name
    same = (there["weight_scale"].cpu() == here["weight_scale"]).float().mean()
    assert float(same) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("size", [0, 10**6], ids=["random projections", "exact"])
def test_low_rank_on_a_gpu(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixq_compile.weights.low_rank.EXACT_SIZE", size)
    recipe = WeightRecipe.parse("int4 absmax rank=16 weighting=activations")
    inputs = {"mean_magnitude": torch.linspace(0.1, 3, 500)}
    here, there = (
        make(recipe, weight(300, 500).to(device), torch.float32, inputs).dequantized(recipe.format, 500)
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)
