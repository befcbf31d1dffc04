import math

import pytest
from commands import mixq, mixq_json

FAST = ("--shape", "96,64", "--replays", "3", "--device", "cpu", "--kernel", "ref")


@pytest.fixture(scope="module")
def result():
    return mixq_json("bench", "kernels", *FAST, "--rows", "2,1024", "--peers", "int_mm")


def test_structure(result) -> None:
    assert result["benchmark"] == "kernels"
    environment = result["environment"]
    assert environment["torch"]
    assert environment["copy_gigabytes_per_second"] > 0
    assert [case["rows"] for case in result["cases"]] == [2, 1024]
    for case in result["cases"]:
        assert (case["out_features"], case["in_features"]) == (96, 64)
        assert {"fp32", "int_mm", "mixq gemm", "mixq whole"} <= set(case["timings"])
        for timing in case["timings"].values():
            assert 0 < timing["p10_us"] <= timing["median_us"] <= timing["p90_us"]
            assert timing["samples"] == 3


def test_speedups_and_rates_follow_from_the_recorded_times(result) -> None:
    for case in result["cases"]:
        times = {name: timing["median_us"] for name, timing in case["timings"].items()}
        assert case["gemm_speedup"] == {name: times[name] / times["mixq gemm"] for name in ("fp32", "int_mm")}
        assert case["whole_speedup"] == {"fp32": times["fp32"] / times["mixq whole"]}
        operations = 2 * case["rows"] * 96 * 64
        for name, rate in case["gemm_tflops"].items():
            assert rate == pytest.approx(operations / (times[name] * 1e-6) / 1e12)


def test_the_quantization_is_set_against_a_copy(result) -> None:
    copied = result["environment"]["copy_gigabytes_per_second"] * 1e9
    for case in result["cases"]:
        cost, times = case["quantization"], case["timings"]
        # fp32 in; int8 codes, fp32 scales and 16 fp32 outlier columns out.
        assert cost["bytes_moved"] == case["rows"] * (64 * 4 + 64 + 4 + 16 * 4)
        seconds = times["quantize, online"]["median_us"] * 1e-6
        assert cost["online_share"] == pytest.approx(cost["bytes_moved"] / seconds / copied)
        whole = times["quantize, online and refresh"]["median_us"]
        assert cost["check_us"] == whole - times["quantize, static"]["median_us"]


def test_means_are_taken_over_many_rows_only(result) -> None:
    many = [case for case in result["cases"] if case["rows"] >= 1024]
    ratio = many[0]["whole_speedup"]["fp32"]
    mean = result["summary"]["whole over fp32, 1024 rows and more: geometric mean"]
    assert mean == pytest.approx(ratio)
    everywhere = [case["whole_speedup"]["fp32"] for case in result["cases"]]
    assert result["summary"]["whole over fp32, all rows: smallest"] == min(everywhere)


def test_errors_reach_the_floor_of_the_scheme(result) -> None:
    for case in result["cases"]:
        errors = case["errors"]
        for source in ("codes", "originals"):
            assert 0 < errors[f"mixq, {source}"] <= 1.05 * errors[f"scheme, {source}"]
        assert errors["mixq, originals"] < errors["mixq, codes"] < 0.02
        assert errors["fp32"] < 1e-6


def test_baselines_that_did_not_run_are_named() -> None:
    found = mixq_json(
        "bench", "kernels", *FAST, "--rows", "2", "--peers", "torchao-fp8,llm-int8", "--only", "whole"
    )
    assert "torchao cannot be imported" in found["missing"]["torchao-fp8"]
    assert "bitsandbytes cannot be imported" in found["missing"]["llm-int8"]
    assert found["missing"]["inductor"] == "not asked for (--peers inductor)"
    (case,) = found["cases"]
    assert set(case["timings"]) == {"fp32", "mixq whole"}
    assert case["gemm_speedup"] == {}
    assert case["errors"] == {}


def test_four_bit_weights() -> None:
    found = mixq_json("bench", "kernels", *FAST, "--rows", "4", "--peers", "none", "--bits", "4")
    assert 0.02 < found["cases"][0]["errors"]["mixq, codes"] < 0.2


def test_markdown() -> None:
    shown = mixq("bench", "kernels", *FAST, "--rows", "2,3", "--peers", "int_mm")
    assert "### The whole linear, µs" in shown.stdout
    assert "| 96×64 | 3 | mixed |" in shown.stdout
    assert "- llm-int8: not asked for (--peers llm-int8)" in shown.stdout
    assert "[2/2] 96×64, 3 rows" in shown.stderr
    for line in shown.stdout.splitlines():
        assert not line.startswith("|") or line.endswith("|")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "a shape is N,K"),
        (["--rows", "1,many"], "positive whole numbers"),
        (["--rows", "0"], "positive whole numbers"),
        (["--bits", "3"], "4 or 8 bits"),
        (["--only", "gem"], "Did you mean 'gemm'"),
        (["--peers", "torchao-int4"], "Did you mean 'torchao-int8'"),
        (["--replays", "1"], "--replays"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--kernel", "triton"], "unknown kernel provider"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    shown = " ".join(mixq("bench", "kernels", *arguments, code=2).output.replace("│", " ").split())
    assert message in shown


def test_geometric_mean() -> None:
    from mixq_compile.benchmarking.results import geometric_mean

    assert geometric_mean([2.0, 8.0, None]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None
    assert math.isclose(geometric_mean([0.5, 2.0]) or 0, 1.0)
