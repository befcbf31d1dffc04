import dataclasses

import pytest
from inspected_models import llama_inspection

from mixq_compile.errors import OptionError
from mixq_compile.inspection.cost import H200, ROWS, DeviceFigures, costs_of, linear_cost
from mixq_compile.inspection.layers import LayerSummary

DEVICE = DeviceFigures("a device", float_rate=1e12, integer_rate=2e12, bandwidth=1e9)


def layer(**changes: object) -> LayerSummary:
    made = LayerSummary(
        fqn="up", role="up", out_features=1024, in_features=1024, dtype="bfloat16", scheme="w8a8",
        weight_bits=8, activation_bits=8, kernel="tl", skip=None, where="", bytes_before=2_000_000,
        bytes_after=1_004_000,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_few_rows_wait_for_the_weight() -> None:
    cost = linear_cost(layer(), 1, DEVICE)
    assert cost["operations"] == 2 * 1024 * 1024
    # x and the result are 2 kB each.
    before, after = 2 * 1024 * 1024 + 2 * 2048, 1024 * 1024 + 4 * 1024 + 2 * 2048
    assert cost["bytes"] == {"before": before, "after": after}
    assert cost["microseconds"] == {"before": before / 1000, "after": after / 1000}


def test_many_rows_wait_for_arithmetic() -> None:
    fast_memory = dataclasses.replace(DEVICE, bandwidth=1e15)
    cost = linear_cost(layer(), 4096, fast_memory)
    operations = 2 * 4096 * 1024 * 1024
    assert cost["microseconds"]["before"] == pytest.approx(operations / 1e12 * 1e6)
    assert cost["microseconds"]["after"] == pytest.approx(operations / 2e12 * 1e6)


def test_outlier_columns_cost_float_operations() -> None:
    fast_memory = dataclasses.replace(DEVICE, bandwidth=1e15)
    plain, mixed = (linear_cost(layer(capacity=c), 4096, fast_memory) for c in (0, 100))
    extra = mixed["microseconds"]["after"] - plain["microseconds"]["after"]
    assert extra == pytest.approx(2 * 4096 * 1024 * 100 / 1e12 * 1e6, rel=1e-4)


def test_a_layer_left_alone_costs_the_same() -> None:
    cost = linear_cost(layer(scheme=None), 256, DEVICE)
    assert cost["microseconds"]["before"] == cost["microseconds"]["after"]


def test_four_bits_move_fewer_bytes_than_eight() -> None:
    eight, four = (linear_cost(layer(weight_bits=bits), 1, DEVICE)["bytes"]["after"] for bits in (8, 4))
    assert eight - four == 1024 * 512


def test_a_product_without_a_known_shape_has_no_cost() -> None:
    assert costs_of(layer(out_features=0), H200) == {}


def test_every_layer_of_an_inspection_has_costs_for_each_number_of_rows() -> None:
    for found in llama_inspection().graphs[0].layers:
        assert tuple(found.costs) == tuple(map(str, ROWS))


def test_figures_must_be_positive() -> None:
    with pytest.raises(OptionError, match="bandwidth"):
        DeviceFigures("broken", 1.0, 1.0, 0.0)
