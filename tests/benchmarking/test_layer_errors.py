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
