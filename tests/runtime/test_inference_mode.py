"""What is made in inference mode is used outside of it, and the other way round, in every order."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from compiling import FEATURES, compiled, rows
from torch import nn

import mixq_compile as mixq

MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "gradients": torch.enable_grad}
OUTLIER = 3


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES)).eval()


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def _assigned(model: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


SWAPS: dict[str, Callable[[nn.Module], Any]] = {
    "quantize": mixq.quantize,
    "with the originals kept": lambda model: mixq.quantize(model, keep_originals=True),
    "with statistics": lambda model: mixq.quantize(model, stats=mixq.calibrate(model, [rows()])),
    "a copy": lambda model: copy.deepcopy(mixq.quantize(model)),
    "a pickle": lambda model: _pickled(mixq.quantize(model)),
    "an assigned state": lambda model: _assigned(mixq.quantize(model)),
    "cast": lambda model: mixq.quantize(model).double().float(),
}
OTHERS: dict[str, Callable[[nn.Module], Any]] = {
    "backend": lambda model: compiled(model),
    "backend over a swap": lambda model: compiled(mixq.quantize(model), lowering="aot_eager"),
    "export": lambda model: mixq.compile(mixq.capture(model, (rows(),)), force=True)[0].module(),
}


def under(mode: str) -> AbstractContextManager[Any]:
    return MODES[mode]()


@pytest.mark.parametrize("use", MODES)
@pytest.mark.parametrize("make", MODES)
@pytest.mark.parametrize("route", {**SWAPS, **OTHERS})
def test_a_quantized_model_learns_in_every_mode(route, make, use):
    with under(make):
        made = {**SWAPS, **OTHERS}[route](model_of())
    x = rows(columns=(OUTLIER,), size=40.0)
    with under(use):
        reference = model_of()(x)
        assert torch.nn.functional.mse_loss(made(x), reference) < 1e-3 * reference.square().mean()


@pytest.mark.parametrize("use", MODES)
@pytest.mark.parametrize("make", MODES)
def test_the_state_is_written_from_outside_in_every_mode(make, use):
    with under(make):
        swapped = mixq.quantize(model_of())
    x = rows(columns=(OUTLIER,), size=40.0)
    with under(use):
        swapped(x)
        assert swapped[0].outlier_state().columns() == [OUTLIER]
        mixq.reset(swapped)
        assert swapped[0].outlier_state().columns() == []
        mixq.freeze(swapped)
        swapped.load_state_dict(swapped.state_dict())
