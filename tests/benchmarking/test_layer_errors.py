import math

import pytest
import torch
from torch import Tensor, nn

from mixq_compile.benchmarking.layer_errors import MOST_DB, layer_errors
from mixq_compile.schemes.registry import get_scheme

FEATURES = 64


class Chain(nn.Module):
    """Two linears; the second one's input has an outlier column."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden + 20.0 * (torch.arange(FEATURES) == 3))


def errors(*names: str, scheme: str = "w8a8o16", columns: dict[str, list[int]] | None = None):  # type: ignore[no-untyped-def]
    x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(1))
    schemes = {name: get_scheme(scheme) for name in names}
    return layer_errors(Chain().eval(), schemes, (x,), {}, columns or {})


def test_each_layer_is_measured_alone_on_what_the_model_feeds_it() -> None:
    found = errors("first", "second")
    assert 35 < found["first"].sqnr_db < 60
    assert (found["first"].found_columns, found["second"].found_columns) == (0, 1)


def test_without_outlier_columns_the_layer_with_outliers_is_much_worse() -> None:
    plain, mixed = errors("second", scheme="w8a8"), errors("second")
    assert plain["second"].sqnr_db < mixed["second"].sqnr_db - 3


def test_calibrated_columns_are_there_from_the_start() -> None:
    assert errors("first", columns={"first": [1, 7]})["first"].found_columns == 2


def test_a_layer_that_is_no_module_is_left_out() -> None:
    assert set(errors("first", "absent")) == {"first"}


def test_the_model_is_left_as_it_was() -> None:
    model = Chain().eval()
    layer_errors(model, {"first": get_scheme("w8a8")}, (torch.randn(2, FEATURES),), {}, {})
    assert type(model.first) is nn.Linear
    assert not model.first._forward_hooks


@pytest.mark.parametrize(("value", "expected"), [(0.0, MOST_DB), (math.nan, -MOST_DB)])
def test_an_exact_or_broken_layer_has_an_error_that_json_can_hold(value: float, expected: float) -> None:
    model = Chain().eval()
    torch.nn.init.constant_(model.first.weight, value)
    x = torch.randn(4, FEATURES)
    found = layer_errors(model, {"first": get_scheme("w8a8")}, (x,), {}, {})
    assert found["first"].sqnr_db == expected


def decibels(signal: Tensor, noise: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


@pytest.mark.parametrize("scheme", ["w8a8o16", "w8a8", "w8a16", "w4a8o16"])
def test_the_parts_of_an_error_are_those_of_its_roundings(scheme: str) -> None:
    """Against both roundings written out in float64; with a column kept, its weight is the original's."""
    model = Chain().eval()
    x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(1)) + 20.0 * (
        torch.arange(FEATURES) == 3
    )
    found = layer_errors(model, {"second": get_scheme(scheme)}, (x - 20.0,), {}, {})["second"]
    with torch.no_grad():
        value = model.first(x - 20.0) + 20.0 * (torch.arange(FEATURES) == 3)
        exact = model.second(value).double()
        weight = model.second.weight.double()
        largest = 127 if "w8" in scheme else 7
        if scheme != "w4a8o16":  # whose scales are searched for
            scale = weight.abs().amax(1, keepdim=True) / largest
            rounded = (weight / scale).round() * scale
            if found.found_columns:
                rounded[:, 3] = weight[:, 3]
            wanted = decibels(exact, (value.double() @ (rounded - weight).T))
            assert found.weights_db == pytest.approx(wanted, abs=0.05)
    if scheme == "w8a16":
        assert found.inputs_db > 100, "its input is not rounded"
    else:
        noise = 10 ** (-found.weights_db / 10) + 10 ** (-found.inputs_db / 10)
        assert -10 * math.log10(noise) == pytest.approx(found.sqnr_db, abs=0.5), "the parts make the whole"
    assert found.left_out == 0


def test_columns_without_a_slot_are_counted() -> None:
    scheme = get_scheme("w8a8o16").with_outliers(threshold=0.5, capacity=16)
    x = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(1))
    found = layer_errors(Chain().eval(), {"first": scheme}, (x,), {}, {})["first"]
    assert found.found_columns == 16
    assert found.left_out > 0
