import copy

import pytest
import torch
from commands import mixq, mixq_json

import mixq_compile
from mixq_compile.benchmarking.decoders import build_decoder, random_tokens, set_attention
from mixq_compile.benchmarking.shapes import MODELS
from mixq_compile.benchmarking.workloads import DECODE, PREFILL, SINGLE, Workload, make_inputs

pytest.importorskip("transformers")

CPU = torch.device("cpu")
FAST = ("--model", "toy", "--device", "cpu", "--replays", "2", "--lowering", "eager")
SCHEMES = ("w8a8o16", "w4a8o16")


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def result():
    return mixq_json(
        "bench", "model", *FAST, "--layers", "1", "--batches", "2", "--contexts", "20", "--prefill", "2x24",
        "--single", "20", "--schemes", ",".join(SCHEMES), "--peers", "torchao-int8",
    )  # fmt: skip


def test_workloads(result) -> None:
    found = [(case["kind"], case["batch"], case["tokens"], case["context"]) for case in result["cases"]]
    assert found == [("prefill", 2, 24, 0), ("decode", 2, 1, 20), ("single", 20, 1, 0)]


def test_ratios_follow_from_the_recorded_times(result) -> None:
    for case in result["cases"]:
        times = {name: timing["median_us"] for name, timing in case["timings"].items()}
        assert set(times) == {"fp32", "fp32, eager"}.union(
            *({scheme, f"{scheme}, eager"} for scheme in SCHEMES)
        )
        assert case["speedup"] == {scheme: times["fp32"] / times[scheme] for scheme in SCHEMES}
        assert case["eager_speedup"]["w8a8o16"] == times["fp32, eager"] / times["w8a8o16, eager"]
        tokens = case["batch"] * case["tokens"]
        assert case["tokens_per_second"]["fp32"] == pytest.approx(tokens / (times["fp32"] * 1e-6))
        assert set(case["first_call_seconds"]) == {"fp32", *SCHEMES}
        assert case["peak_bytes"] == {}, "a CPU tells no peak"
    smallest = min(case["speedup"]["w8a8o16"] for case in result["cases"] if case["kind"] == "decode")
    assert result["summary"]["w8a8o16 over fp32 under Inductor, decode: smallest"] == smallest


def test_memory_of_the_quantized_linears(result) -> None:
    eight, four = result["memory"]
    assert (eight["scheme"], eight["linears"]) == ("w8a8o16", 7)
    assert eight["ratio"] == eight["bytes_after"] / eight["bytes_before"]
    assert four["ratio"] < eight["ratio"] < 0.6


def test_peers_that_are_not_there_are_named(result) -> None:
    assert "torchao cannot be imported" in result["missing"]["torchao-int8"]
    assert result["missing"]["llm-int8"] == "not asked for (--peers llm-int8)"


def test_model_in_markdown_without_eager() -> None:
    shown = mixq("bench", "model", *FAST, "--layers", "1", "--only", "single", "--single", "3", "--no-eager")
    assert "### 1 of 2 layers of toy, ms" in shown.stdout
    assert "|  | fp32 | w8a8o16 | w8a8o16 over fp32 |" in shown.stdout
    assert "| one token without cache, 3 |" in shown.stdout
    assert "[1/1] one token without cache, 3" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama2-7b"], "Did you mean 'llama-2-7b'"),
        (["--model", "toy", "--layers", "3"], "toy has 1 to 2 layers"),
        (["--prefill", "2048"], "sequences x tokens"),
        (["--only", "decoding"], "Did you mean 'decode'"),
        (["--schemes", "w8a8o61"], "Did you mean 'w8a8o16'"),
        (["--peers", "fp8"], "unknown peer 'fp8'"),
    ],
)
def test_wrong_options_of_model(arguments: list[str], message: str) -> None:
    shown = " ".join(mixq("bench", "model", *arguments, code=2).output.replace("│", " ").split())
    assert message in shown


def test_a_layer_whole_and_by_projection() -> None:
    found = mixq_json(
        "bench", "layers", *FAST, "--rows", "1,20", "--schemes", ",".join(SCHEMES), "--peers", "none",
        "--kernel", "ref",
    )  # fmt: skip
    assert [case["rows"] for case in found["cases"]] == [1, 20]
    for case in found["cases"]:
        times = {name: timing["median_us"] for name, timing in case["timings"].items()}
        assert case["speedup"] == {scheme: times["fp32"] / times[scheme] for scheme in SCHEMES}
        named = [(tuple(entry["projections"]), entry["bits"]) for entry in case["projections"]]
        assert (("q_proj", "o_proj"), 8) in named
        assert (("down_proj",), 4) in named
        for entry in case["projections"]:
            own = entry["timings"]["mixq whole"]["median_us"]
            assert entry["speedup"] == {"fp32": entry["timings"]["fp32"]["median_us"] / own}
    assert found["missing"]["fp8-dynamic"] == "not asked for (--peers fp8-dynamic)"


def test_planted_outliers_are_few_and_found() -> None:
    model = build_decoder(MODELS["toy"], 2, 64, torch.float32, CPU)
    swapped = mixq_compile.quantize(copy.deepcopy(model), threshold=6.0)  # what they were planted for
    swapped(random_tokens(model, 8, 32))
    for linear in mixq_compile.report(swapped).quantized:
        assert linear.overflow == 0
        assert len(linear.outlier_columns) <= 2, f"{linear.fqn} has outliers that were not planted"
        if linear.fqn.endswith(("q_proj", "gate_proj")):
            assert linear.outlier_columns, f"the channel planted before {linear.fqn} was not found"


@pytest.mark.parametrize(
    "workload", [Workload(PREFILL, 2, 24), Workload(DECODE, 2, 1, 20), Workload(SINGLE, 5, 1)], ids=str
)
def test_repeated_calls_of_a_workload_give_the_same_logits(workload: Workload) -> None:
    shape = MODELS["toy"]
    model = build_decoder(shape, 2, 64, torch.float32, CPU)
    inputs = make_inputs(workload, model, shape, 2, CPU, torch.float32)
    outputs = []
    for _ in range(3):
        inputs.reset()
        outputs.append(model(**inputs.given).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[0].shape == (workload.batch, 1, shape.vocabulary)


def test_attention_without_a_mask_is_causal() -> None:
    model = build_decoder(MODELS["toy"], 2, 64, torch.float32, CPU)
    tokens = random_tokens(model, 3, 24)
    masked = model(tokens, use_cache=False).logits
    set_attention(model, masked=False)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, masked)
    set_attention(model, masked=True)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, masked)
