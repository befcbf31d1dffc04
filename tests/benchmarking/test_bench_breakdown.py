import pytest
import torch
from commands import mixq, mixq_json

from mixq_compile.benchmarking.forced_misses import MissPattern, miss_costs
from mixq_compile.benchmarking.packed_linear import PackedLinear
from mixq_compile.benchmarking.planted import planted_activation, planted_columns, random_weight
from mixq_compile.benchmarking.staged_linear import STAGES
from mixq_compile.errors import MixqError
from mixq_compile.evaluation import relative_error

CPU = torch.device("cpu")
COLUMNS = planted_columns(64, 16)


def packed() -> PackedLinear:
    linear = PackedLinear.pack(random_weight(96, 64, torch.float32, CPU), 8, 16, "ref")
    linear.know(COLUMNS)
    return linear


def activation(rows: int = 20) -> torch.Tensor:
    return planted_activation(rows, 64, COLUMNS, 20.0, torch.float32, CPU)


@pytest.fixture(scope="module")
def result():
    return mixq_json(
        "bench", "breakdown", "--shape", "96,64", "--rows", "20", "--replays", "3", "--device", "cpu",
        "--kernel", "ref",
    )  # fmt: skip


def test_every_stage_computes_the_same_linear() -> None:
    linear, x = packed(), activation()
    exact = x.double() @ linear.weight.double().T
    outputs = {name: stage(linear, x) for name, stage in STAGES.items()}
    for name, output in outputs.items():
        assert relative_error(exact, output) < 0.01, name
        assert relative_error(outputs["fused dequantization"], output) < 1e-5, name


def test_ratios_follow_from_the_recorded_times(result) -> None:
    (case,) = result["cases"]
    times = {name: timing["median_us"] for name, timing in case["timings"].items()}
    assert case["stage_speedup"] == {name: times["fp32"] / times[name] for name in STAGES}
    assert case["policy_overhead"]["exact"] == times["exact"] / times["static"] - 1
    assert case["missing"] == {}


def test_misses_really_happen_at_the_asked_rates(result) -> None:
    (case,) = result["cases"]
    costs = case["misses"]
    assert [cost["percent"] for cost in costs] == [0, 1, 5, 20, 100]
    assert all(cost["calls"] == 100 for cost in costs)
    # Three rounds before are not timed.
    assert [cost["misses"] for cost in costs] == [0, 1, 5, 20, 103]
    for cost in costs:
        assert cost["overhead"] == pytest.approx(cost["mean_us"] / costs[0]["mean_us"] - 1)


def test_a_pattern_spreads_its_misses_and_any_100_calls_hold_as_many() -> None:
    pattern = MissPattern(packed(), COLUMNS, 20)
    x, learned = activation(), []
    for _ in range(10):
        pattern.prepare()
        before = len(pattern.linear.state.columns())
        pattern.linear.whole(x)
        learned.append(len(pattern.linear.state.columns()) - before)
    assert learned == [0, 0, 0, 0, 1] * 2
    pattern.note()
    assert int(pattern.seen) == pattern.planned == 2


def test_a_miss_that_does_not_happen_is_an_error() -> None:
    quiet = activation().clamp(-5, 5)
    with pytest.raises(MixqError, match="the miss path did not run as planned"):
        miss_costs(packed(), COLUMNS, quiet, (0, 100))


def test_breakdown_in_markdown() -> None:
    shown = mixq(
        "bench", "breakdown", "--shape", "96,64", "--rows", "20", "--replays", "2", "--device", "cpu",
        "--kernel", "ref",
    ).stdout  # fmt: skip
    assert "| N × K | M | 16 bit | detect first, host waits |" in shown
    assert "| 96×64 | 20 | 100 % | 103 |" in shown
