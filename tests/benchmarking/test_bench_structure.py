import pytest
import torch
from commands import mixq, mixq_json

from mixq_compile.benchmarking.packed_linear import PackedLinear
from mixq_compile.benchmarking.permuted_linear import PermutedLinear
from mixq_compile.benchmarking.planted import planted_activation, planted_columns, random_weight

FAST = ("--shape", "96,64", "--rows", "5,20", "--replays", "3", "--device", "cpu", "--kernel", "ref")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result():
    return mixq_json("bench", "structure", *FAST)


def test_both_layouts_give_the_same_result(result) -> None:
    assert [case["rows"] for case in result["cases"]] == [5, 20]
    for case in result["cases"]:
        assert case["difference"] < 1e-6
        assert case["outlier_columns"] == 16


def test_the_speedup_follows_from_the_recorded_times(result) -> None:
    for case in result["cases"]:
        times = {name: timing["median_us"] for name, timing in case["timings"].items()}
        assert case["speedup"] == times["permuted: whole"] / times["order-reserved: whole"]
    mean = result["summary"]["order-reserved over permuted: geometric mean"]
    first, second = (case["speedup"] for case in result["cases"])
    assert mean == pytest.approx((first * second) ** 0.5)


def test_bytes_of_both_layouts(result) -> None:
    case = result["cases"][0]
    assert case["bytes_ours"] == 96 * 64 + 96 * 16 * 4
    assert case["bytes_permuted"] == 96 * 48 + 96 * 16 * 4


def test_changes_of_the_permuted_layout_keep_its_meaning() -> None:
    columns = planted_columns(64, 16)
    linear = PackedLinear.pack(random_weight(96, 64, torch.float32, CPU), 8, 16, "ref")
    permuted = PermutedLinear.of(linear, columns)
    x = planted_activation(9, 64, columns, 20.0, torch.float32, CPU)
    before = permuted.whole(x)
    permuted.permute_again()
    assert torch.equal(permuted.whole(x), before)
    permuted.move_one()
    assert torch.equal(permuted.codes[:, 0], linear.codes[:, permuted.inner[0]])


def test_structure_in_markdown() -> None:
    shown = mixq("bench", "structure", *FAST)
    assert "permuted over order-reserved" in shown.stdout
    assert "### A new outlier column, µs" in shown.stdout
    assert "[2/2] 96×64, 20 rows" in shown.stderr
