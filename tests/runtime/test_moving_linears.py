"""Moving and casting a `MixqLinear`: codes, scales and state keep their bits, also where it fails."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from compiling import FEATURES, rows
from torch import Tensor, nn
from uncalibrated import UNCALIBRATED

from mixq_compile import MixqLinear
from mixq_compile.errors import OperandError
from mixq_compile.runtime.mixq_linear import STAYS_FP32
from mixq_compile.schemes.registry import get_scheme

X = rows(6, columns=(3,))
INTEGERS = ("weight_codes", "index", "column_slot", "counters", "cached_index")
EXACT = (*STAYS_FP32, *INTEGERS)
"""Buffers that no move or cast may change."""


def linear(scheme: str = "w8a8o16") -> MixqLinear:
    torch.manual_seed(0)
    original = nn.Linear(FEATURES, 48).requires_grad_(False)
    module = MixqLinear.from_linear(original, get_scheme(scheme), columns=[20], keep_original=True)
    module(X)
    return module


def empty() -> MixqLinear:
    module = MixqLinear(FEATURES, 48, get_scheme("w8a8o16"), bias=True, dtype=torch.float32)
    module.register_buffer("outlier_source", torch.empty(48, FEATURES))
    return module


def assert_exact(found: MixqLinear, wanted: MixqLinear) -> None:
    for name in EXACT:
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert mine.dtype == theirs.dtype, f"{name} became {mine.dtype}"
        assert torch.equal(mine, theirs), f"{name} has other values"


class NoMemory(Exception):
    pass


def failing_after(calls: int) -> Callable[[Tensor], Tensor]:
    """A move that fails on one of the tensors, as a device out of memory does."""
    left = [calls]

    def move(tensor: Tensor) -> Tensor:
        if left[0] == 0:
            raise NoMemory
        left[0] -= 1
        return tensor.half() if tensor.is_floating_point() else tensor.clone()

    return move


@pytest.mark.parametrize("calls", range(12))
def test_a_move_that_fails_midway_leaves_right_scales(calls: int) -> None:
    module, untouched = linear(), linear()
    with pytest.raises(NoMemory):
        nn.Sequential(module)._apply(failing_after(calls))
    assert_exact(module, untouched)
    other = empty()
    other.load_state_dict(module.state_dict())
    wanted = untouched(X)
    assert float((other(X) - wanted).abs().max()) < 4e-3 * float(wanted.abs().max())
    assert torch.equal(module.float().weight_scale, untouched.weight_scale)


def test_a_move_that_torch_refuses() -> None:
    module, untouched = linear(), linear()
    with pytest.raises((AssertionError, RuntimeError)):
        nn.Sequential(module).to("vulkan")
    assert_exact(module, untouched)
    assert torch.equal(module(X), untouched(X))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to float64": lambda module: module.to(torch.float64),
    "type float16": lambda module: module.type(torch.float16),
    "type float64": lambda module: module.type(torch.float64),
    "half and float": lambda module: module.half().float(),
    "to cpu": lambda module: module.to("cpu"),
    "to a tensor": lambda module: module.to(torch.zeros(1, dtype=torch.float16)),
    "share_memory": lambda module: module.share_memory(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapping"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwriting"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_gives_the_same_linear(cast: str, overwrite: bool, swap: bool) -> None:
    untouched = linear()
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = CASTS[cast](nn.Sequential(linear()))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
    module = model[0]
    assert_exact(module, untouched)
    assert (module.weight.dtype, module.weight.device) == (module.bias.dtype, module.bias.device)
    wanted = untouched(X)
    found = model(X.to(module.bias.dtype))
    assert found.dtype == module.bias.dtype
    rounded = torch.float16 if "half" in cast else found.dtype  # of bias, outlier weight and x
    part = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}.get(rounded, 1e-6)
    assert float((found - wanted).abs().max()) <= part * float(wanted.abs().max())


@pytest.mark.parametrize("scheme", UNCALIBRATED)
def test_float64(scheme: str) -> None:
    module, untouched = linear(scheme).double(), linear(scheme)
    found = module(X.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, untouched(X).double(), rtol=1e-5, atol=1e-5)
    before = module.outlier_state().columns()
    with pytest.raises(OperandError, match=r"x has the dtype float32, and .* float64: cast either"):
        module(rows(60, columns=(9,)))
    assert module.outlier_state().columns() == before, "a call that failed has taught columns"


def test_a_move_to_where_it_is_keeps_the_tensors() -> None:
    module = linear()
    before = {name: getattr(module, name) for name in EXACT}
    module.to("cpu").float()
    for name, buffer in before.items():
        assert getattr(module, name) is buffer, f"{name} is another tensor"


def test_shared_memory_is_shared_by_scales_too() -> None:
    module = linear().share_memory()
    for name in EXACT:
        assert getattr(module, name).is_shared(), f"{name} is not shared"


def test_an_uninitialised_linear_takes_a_state_dict() -> None:
    wanted = linear()
    module = torch.nn.utils.skip_init(
        MixqLinear, FEATURES, 48, get_scheme("w8a8o16"), bias=True, dtype=torch.float32
    )
    module.register_buffer("outlier_source", torch.empty(48, FEATURES))
    module.load_state_dict(wanted.state_dict())
    assert_exact(module, wanted)
    assert (module.weight.dtype, module.weight.device) == (module.bias.dtype, module.bias.device)
    assert torch.equal(module(X), wanted(X))


def test_meta_and_back() -> None:
    wanted = linear()
    module = copy.deepcopy(wanted).to("meta")
    assert all(getattr(module, name).is_meta for name in EXACT)
    assert module.weight_scale.dtype == torch.float32
    module.to_empty(device="cpu").load_state_dict(wanted.state_dict())
    assert_exact(module, wanted)
    assert (module.weight.dtype, module.weight.device) == (module.bias.dtype, module.bias.device)


def test_a_part_that_lies_elsewhere_is_an_error() -> None:
    module = linear()
    module.weight_codes = nn.Parameter(module.weight_codes.to("meta"), requires_grad=False)
    with pytest.raises(OperandError, match="weight_codes is on meta, and others are on cpu"):
        torch.ops.mixq.mixed_linear(
            X, torch.zeros(6, FEATURES, dtype=torch.int8), torch.ones(6), torch.zeros(6, 16),
            module.counters, module.weight_codes, module.weight_scale, module.outlier_weight, None, 0, "cpu",
        )  # fmt: skip
