"""`mixq bench generate`: what it measures of `generate()`, and that nothing measured is lost."""

from __future__ import annotations

import json

import pytest
import torch
from commands import mixq, mixq_json

import mixq_compile
from mixq_compile.benchmarking.decoders import build_decoder
from mixq_compile.benchmarking.generating import empty_forward, random_prompt, run
from mixq_compile.benchmarking.generating_results import GenerateOptions
from mixq_compile.benchmarking.shapes import MODELS
from mixq_compile.errors import OptionError

pytest.importorskip("transformers")

CPU = torch.device("cpu")
FAST = (
    "bench", "generate", "toy", "--device", "cpu", "--replays", "2", "--lowering", "eager", "--prompt", "6",
    "--new", "4", "--layers", "1",
)  # fmt: skip
PAPER = ["Batch Size", "Decode Length", "Decode tokens/s", "Memory (VRAM)"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("generate")
    mixq(*FAST, "--batches", "2", "--schemes", "w8a8o16,w4a8o16", "--unprepared", "--output", target)
    return target


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "generate.json").read_text())


def test_every_variant_at_every_batch(result) -> None:
    found = {(case["variant"], case["batch"]) for case in result["cases"]}
    names = {"fp32", "w8a8o16", "w4a8o16"}
    names |= {f"{name}, unprepared" for name in names}
    assert found == {(name, batch) for name in names for batch in (2,)}


def test_figures_follow_from_each_other(result) -> None:
    for case in result["cases"]:
        assert case["decode_tokens_per_second"] == pytest.approx(case["batch"] / case["step_ms"] * 1e3)
        if case["variant"].endswith("unprepared"):
            assert case["host_share_ms"] is None
            assert case["compiled_graphs"] == 0
            continue
        assert isinstance(case["host_share_ms"], float), "two calls of a few tokens tell its size badly"
        assert case["step_without_host_share_ms"] == pytest.approx(case["step_ms"] - case["host_share_ms"])
        assert case["compiled_graphs"] == 2, "one for prompts, one for decoding"
        assert case["graphs_of_another_length"] == 0
        assert case["cache_bytes"] == 2 * case["batch"] * 2 * 10 * 16 * 4, "keys and values of 10 tokens"
        assert case["memory_bytes"] is None, "a CPU tells no peak"
    weights = {case["variant"]: case["weight_bytes"] for case in result["cases"]}
    assert weights["w4a8o16"] < weights["w8a8o16"] < weights["fp32"]


def test_the_table_begins_as_the_papers_does(folder) -> None:
    lines = (folder / "generate.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| Batch Size"))
    assert [cell.strip() for cell in header.strip("|").split("|")][:4] == PAPER


def test_an_interrupted_run_keeps_what_it_measured_and_goes_on(tmp_path, monkeypatch) -> None:
    built = []

    def load():
        built.append(1)
        if len(built) == 2:
            raise KeyboardInterrupt
        return build_decoder(MODELS["toy"], 1, 16, torch.float32, CPU)

    options = GenerateOptions(
        model="toy", layers=1, batches=(1,), prompt=4, new=3, replays=2, dtype="float32", lowering="eager"
    )

    def measure(resume):
        return run(options, CPU, lambda *_: None, "abc", load=load, folder=tmp_path, resume=resume)

    with pytest.raises(KeyboardInterrupt):
        measure(False)
    kept = json.loads((tmp_path / "generate.json").read_text())["cases"]
    assert [case["variant"] for case in kept] == ["fp32"]
    document = measure(True)
    assert [case.variant for case in document.cases] == ["fp32", "w8a8o16"]
    assert document.to_json()["cases"][0] == kept[0], "it was measured again"
    assert len(built) == 3
    other = GenerateOptions(
        model="toy", layers=1, batches=(1,), prompt=5, new=3, replays=2, dtype="float32", lowering="eager"
    )
    with pytest.raises(OptionError, match="prompt=4"):
        run(other, CPU, lambda *_: None, "abc", load=load, folder=tmp_path, resume=True)


def test_an_empty_forward_computes_nothing_and_leaves_the_model_as_it_was() -> None:
    model = build_decoder(MODELS["toy"], 1, 16, torch.float32, CPU)
    prompt = random_prompt(model, 2, 4)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(prompt, **given)
    mixq_compile.prepare_for_generation(model, max_length=16, backend="eager", batch_sizes=2)
    with empty_forward(model):
        assert not model.generate(prompt, **given)[:, 4:].any(), "zeros are the likeliest token 0"
    assert torch.equal(model.generate(prompt, **given), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lama",), "llama-2-7b"),
        (("toy", "--layers", "9"), "1 to 2 layers"),
        (("toy", "--schemes", "w8"), "w8a8o16"),
        (("toy", "--resume"), "--output"),
        (("toy", "--new", "1"), "2"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_built(arguments, message, monkeypatch) -> None:
    from mixq_compile.benchmarking import decoders

    monkeypatch.setattr(decoders, "build_decoder", None)
    assert message in mixq("bench", "generate", *arguments, "--device", "cpu", code=2).output


def test_json_goes_to_stdout() -> None:
    result = mixq_json(*FAST, "--batches", "1")
    assert result["summary"].keys() == {
        "w8a8o16 over fp32, whole step: geometric mean",
        "w8a8o16 over fp32, step without transformers' share: geometric mean",
    }
