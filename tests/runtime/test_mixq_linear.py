"""`MixqLinear`: a linear that holds codes, in eager mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compiling import FEATURES, rows
from rewriting import sqnr
from torch import nn
from uncalibrated import UNCALIBRATED

from mixq_compile import MixqLinear
from mixq_compile.errors import OperandError
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.schemes.registry import get_scheme

SCHEME = get_scheme("w8a8o16")


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, 48, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("name", UNCALIBRATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_scheme_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    original = linear(dtype)
    module = MixqLinear.from_linear(original, get_scheme(name), keep_original=True)
    x = rows(6, columns=(3,) if "o16" in name else ()).to(dtype)
    result = module(x)
    assert result.dtype == dtype
    assert sqnr(original(x), result) > (15 if name == "w4a4o16" else 18 if "w4" in name else 35)


@pytest.mark.parametrize("shape", [(FEATURES,), (0, FEATURES), (1, FEATURES), (2, 3, FEATURES)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_shape(shape: tuple[int, ...], bias: bool) -> None:
    module = MixqLinear.from_linear(linear(bias=bias), SCHEME)
    assert module(torch.randn(shape)).shape == (*shape[:-1], 48)


def test_the_16_bit_weight_is_gone() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert (48, FEATURES) not in [shape for name, shape in shapes.items() if name != "weight_codes"]
    assert module.nbytes < 48 * FEATURES * 4 * 0.7


def test_what_tensor_parallel_shards_is_a_parameter_and_the_state_is_not() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    parameters = dict(module.named_parameters())
    assert sorted(parameters) == ["bias", "outlier_weight", "weight_codes", "weight_scale"]
    assert not any(parameter.requires_grad for parameter in parameters.values())
    assert set(STATE_FIELDS) <= set(dict(module.named_buffers()))


def test_the_first_floating_point_parameter_tells_the_dtype_of_the_model() -> None:
    module = MixqLinear.from_linear(linear().bfloat16(), SCHEME)
    assert next(each.dtype for each in module.parameters() if each.is_floating_point()) == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: module.to_empty(device="cpu")])
def test_copies_keep_rows_at_multiples_of_16_bytes(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = copied(MixqLinear.from_linear(nn.Linear(40, 32), SCHEME))
    assert module.weight_codes.stride() == (48, 1)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "double"])
def test_a_cast_leaves_scales_and_thresholds_in_fp32(cast: str) -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    module(rows(6, columns=(3,)))
    before = {name: tensor.clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    moved = nn.Sequential(module)
    moved.to(torch.float16) if cast == "to" else getattr(moved, cast)()
    for name in ("weight_scale", "column_max", "effective_threshold"):
        buffer = getattr(module, name)
        assert buffer.dtype == torch.float32, f"{name} was cast"
        assert torch.equal(buffer, before[name])
    for name in ("weight_codes", "index", "column_slot", "counters", "cached_index"):
        assert torch.equal(getattr(module, name), before[name])
    dtype = {"half": torch.float16, "to": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[
        cast
    ]
    assert module.outlier_weight.dtype == module.bias.dtype == dtype
    if dtype != torch.float64:
        x = rows(6, columns=(3,))
        assert sqnr(linear()(x), module(x.to(dtype))) > 35


def test_moving_to_meta_and_back_by_to_empty() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME).to("meta")
    assert module.weight_scale.dtype == torch.float32
    assert module.weight_scale.is_meta
    assert module.to_empty(device="cpu").weight_codes.shape == (48, FEATURES)


@pytest.mark.parametrize("name", ["w8a8o16", "w4a8o16"])
def test_a_state_dict_round_trip_changes_no_bit(name: str) -> None:
    scheme = get_scheme(name)
    module = MixqLinear.from_linear(linear(), scheme)
    module(rows(6, columns=(3,)))
    other = MixqLinear(FEATURES, 48, scheme, bias=True, dtype=torch.float32)
    other.load_state_dict(module.state_dict())
    x = rows(7, columns=(3, 20))
    assert torch.equal(module(x), other(x))


def test_what_is_saved_and_what_is_not() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    names = set(module.state_dict(keep_vars=True))
    assert names == {
        "weight_codes",
        "weight_scale",
        "index",
        "column_slot",
        "column_max",
        "counters",
        "effective_threshold",
        "cached_index",
        "outlier_weight",
        "bias",
    }
    saved = module.state_dict()
    assert set(saved) == names | {"weight"}
    assert saved["weight"].shape == (1,), "an ordinary linear would load it"
    assert saved["weight"].isnan().all()
    keeping = MixqLinear.from_linear(linear(), SCHEME, keep_original=True)
    assert set(keeping.state_dict()) == names | {"weight", "outlier_source"}


def test_a_deep_copy_learns_on_its_own() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    other = copy.deepcopy(module)
    other(rows(6, columns=(3,)))
    assert module.outlier_state().columns() == []
    assert other.outlier_state().columns() == [3]


def test_calibrated_columns_keep_their_16_bit_weights() -> None:
    original = linear()
    module = MixqLinear.from_linear(original, get_scheme("w4a8o16"), columns=[3, 20], column_max=[9.0, 8.0])
    assert torch.equal(module.outlier_weight[:, :2], original.weight[:, [3, 20]])
    assert module.outlier_state().columns() == [3, 20]
    module.outlier_state().reset()
    assert module.outlier_state().columns() == [3, 20]


@pytest.mark.parametrize(
    ("miss", "calibrated", "kept", "expected"),
    [
        ("exact", False, False, "codes"),
        ("exact", False, True, "original"),
        ("exact", True, False, "codes"),
        ("static", True, False, "original"),
        ("frozen", True, False, "original"),
    ],
)
def test_the_source_of_outlier_weights_is_named(
    miss: str, calibrated: bool, kept: bool, expected: str
) -> None:
    module = MixqLinear.from_linear(
        linear(), SCHEME.with_outliers(miss=miss), columns=[3] if calibrated else None, keep_original=kept
    )
    assert module.outlier_weight_source == expected
    assert MixqLinear.from_linear(linear(), get_scheme("w8a8")).outlier_weight_source is None


def test_a_conv1d_of_transformers_is_turned() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    original = conv1d(48, FEATURES)
    nn.init.normal_(original.bias)
    module = MixqLinear.from_linear(original, SCHEME)
    assert (module.out_features, module.in_features) == (48, FEATURES)
    assert sqnr(original(rows()), module(rows())) > 35


def test_printing_shows_shape_and_scheme() -> None:
    text = "MixqLinear(in_features=64, out_features=48, scheme=w8a8o16)"
    assert repr(MixqLinear.from_linear(linear(), SCHEME)) == text


def test_gradients_do_not_flow_and_nothing_fails() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    assert not module(rows()).requires_grad


def test_what_the_forward_follows_cannot_be_assigned() -> None:
    """Its recipe is read once: an assignment would be accepted, and change nothing."""
    module = MixqLinear.from_linear(linear(), SCHEME)
    for name, value in (("scheme", get_scheme("w8a8")), ("batch_invariant", True)):
        with pytest.raises(AttributeError):
            setattr(module, name, value)
    assert (module.scheme, module.batch_invariant) == (SCHEME, False)


def test_a_nested_input_takes_no_row_mask() -> None:
    module = MixqLinear.from_linear(linear(), SCHEME)
    x = torch.nested.nested_tensor([rows(2), rows(3)])
    with pytest.raises(OperandError, match="takes no row_mask"):
        module(x, row_mask=torch.ones(2, 3, dtype=torch.bool))


def test_rows_that_a_module_is_told_to_ignore_teach_nothing() -> None:
    module = MixqLinear.from_linear(linear(), get_scheme("w8a8o16"), keep_original=True)
    x = rows(6, columns=(3,), size=500.0)
    mask = torch.zeros(6, dtype=torch.bool)
    module(x, row_mask=mask)
    assert module.outlier_state().columns() == []
    mask[2] = True
    module(x, row_mask=mask)
    assert module.outlier_state().columns() == [3]
