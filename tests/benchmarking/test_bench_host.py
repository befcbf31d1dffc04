"""`mixq bench host`: what it measures, and that its ratios follow from the recorded times."""

from __future__ import annotations

from typing import Any

import pytest
from commands import mixq_json

OPERATORS = {
    "quantize_online", "refresh_outlier_weights", "mixed_linear", "activated_linear",
    "weight_only_linear", "linear, by its module", "fp32 linear",
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> Any:
    return mixq_json(
        "bench", "host", "--model", "toy", "--layers", "1", "--batches", "2x8,1x4", "--replays", "3",
        "--device", "cpu", "--lowering", "eager",
    )  # fmt: skip


def test_every_operator_of_a_linear_is_timed(result: Any) -> None:
    assert {case["name"] for case in result["operators"]} == OPERATORS
    assert all(case["host_us"] > 0 for case in result["operators"])


def test_each_way_runs_each_batch(result: Any) -> None:
    found = [(case["way"], case["sequences"], case["tokens"]) for case in result["cases"]]
    assert found == [(way, *batch) for way in ("compiled", "eager") for batch in ((2, 8), (1, 4))]


def test_graphs_are_said_to_be_missing_on_a_cpu(result: Any) -> None:
    assert result["missing"] == {"compiled, CUDA graphs": "there are no CUDA graphs on a CPU"}


def test_ratios_follow_from_the_recorded_times(result: Any) -> None:
    for case in result["cases"]:
        ordinary, mixq = case["ordinary"], case["mixq"]
        assert (ordinary["device_us"], mixq["device_us"]) == (None, None)
        assert case["host_ratio"] == mixq["host_us"] / ordinary["host_us"]
        assert case["speedup"] == ordinary["host_us"] / mixq["host_us"]
        name = f"{case['way']}, {case['sequences']}x{case['tokens']}: host time over 16 bit's"
        assert result["summary"][name] == case["host_ratio"]
