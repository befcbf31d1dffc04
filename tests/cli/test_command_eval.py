import json
from pathlib import Path

import pytest
from commands import mixq, mixq_json
from shared_data import shared_data, shared_text

from mixq_compile.cli import evaluating
from mixq_compile.cli.evaluating import Evaluation
from mixq_compile.cli.models import LoadedModel
from mixq_compile.cli.texts import batches, windows

SEPARATOR = "<|endoftext|>"
FAST = ("--force", "--lowering", "eager", "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SEPARATOR.join(f"{name} had a ball.\n" for name in ("Ann", "Bob", "Cleo", "Don")))
    return path


def test_stories(text: Path) -> None:
    """Two stories under three schemes, 4 bit calibrated on the stories that are not scored."""
    text.write_text(SEPARATOR.join(shared_text("tinystories.txt").split(SEPARATOR)[:10]))
    result = mixq_json(
        "eval", shared_data("stories260k"), "--text", text,
        "--protocol", "stories", "--limit", 2, "--scheme", "w8a8o16", "--scheme", "w4a4o16",
        "--scheme", "w4a4o16{threshold=inf}", "--scheme", "none", *FAST,
    )  # fmt: skip
    full, eight, four, plain = result["rows"]
    assert (result["protocol"], result["documents"]) == ("stories", 2)
    assert len(result["text_sha256"]) == 64
    assert full["delta"] is None
    assert abs(eight["delta"]) < 0.05
    assert eight["delta"] < four["delta"] < plain["delta"]
    assert eight["quantized"] == 35
    assert 0 < four["outlier_share"]["max"] <= 0.25
    assert four["notes"][0].startswith("calibrated on the last 8 windows")
    assert plain["outlier_share"]["max"] == 0
    assert not any("calibrated" in note for note in plain["notes"])


def test_generation(text: Path) -> None:
    arguments = (
        "tiny_models:llama",
        "--text",
        text,
        "--protocol",
        "stories",
        "--generate",
        4,
        "--prompt",
        "Ann",
    )
    result = mixq_json("eval", *arguments, "--scheme", "w8a8o16", *FAST)
    full, eight = result["rows"]
    assert result["prompt"] == "Ann"
    assert isinstance(full["generated"], str)
    assert eight["agreement"]["equal_tokens"] <= 4
    assert "Greedy text" in mixq("eval", *arguments, *FAST).stdout


def test_a_file_of_statistics_and_a_quantized_directory(text: Path, tmp_path: Path) -> None:
    model, stats, folder = "tiny_models:llama", tmp_path / "stats.safetensors", tmp_path / "quantized"
    calibrated = mixq_json("calibrate", model, "--text", text, "--output", stats, "--batch", 2)
    assert calibrated["windows"] == 4
    assert len(calibrated["linears"]) == 8
    written = mixq_json("quantize", model, "--output", folder, "--scheme", "w4a4o16", "--stats", stats)
    assert written["tokenizer"]
    assert written["bytes_after"] < written["bytes_before"]
    skipped = [linear["fqn"] for linear in written["linears"] if linear["scheme"] is None]
    assert skipped == ["lm_head"]
    common = ("--text", text, "--protocol", "stories", *FAST)
    four = ("--scheme", "w4a4o16", "--stats", stats, "--miss", "static")
    (row,) = mixq_json("eval", folder, *common)["rows"]
    assert row["quantized"] == 7
    reference, other = mixq_json("eval", model, *four, *common)["rows"]
    assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)
    assert other["perplexity"] == pytest.approx(reference["perplexity"], rel=0.1)
    assert "is quantized already" in mixq("eval", folder, "--scheme", "w8a8", *common, code=2).stderr
    assert "is quantized already" in mixq("quantize", folder, "--output", tmp_path / "x", code=2).stderr


def test_four_bit_weights_need_statistics(tmp_path: Path) -> None:
    arguments = ("quantize", "tiny_models:llama", "--output", tmp_path / "q", "--scheme", "w4a8o16")
    assert "run mixq calibrate tiny_models:llama" in mixq(*arguments, code=2).stderr


def test_a_directory_with_files_is_not_written_to(text: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    arguments = ("quantize", "tiny_models:llama", "--output", tmp_path)
    assert "has files in it" in mixq(*arguments, code=2).stderr
    assert "7 of 8 linears quantized" in mixq(*arguments, "--overwrite").stdout
    own = ("quantize", tmp_path, "--output", tmp_path, "--overwrite")
    assert "the model's own directory" in mixq(*own, code=2).stderr
    assert "is a file" in mixq("quantize", "tiny_models:llama", "--output", text, code=2).stderr


def test_linears_with_a_scheme_of_their_own(tmp_path: Path) -> None:
    result = mixq_json(
        "quantize", "tiny_models:llama", "--output", tmp_path / "q",
        "--layer", "down_proj=w8a16", "--ignore", "q_proj", "--ignore", "lm_head",
    )  # fmt: skip
    schemes = {linear["role"]: linear["scheme"] for linear in result["linears"]}
    assert schemes["down"] == "w8a16"
    assert schemes["q"] is None
    assert schemes["k"] == "w8a8o16"


def test_models_that_eval_refuses(text: Path) -> None:
    shown = mixq("eval", "tiny_models:bert", "--text", text, code=1).stderr
    assert "does not predict the next token" in shown


def test_calibration_needs_a_folder_to_write_to(text: Path) -> None:
    shown = mixq("calibrate", "tiny_models:llama", "--text", text, "--output", "/nowhere/stats", code=2)
    assert "there is no folder /nowhere" in shown.stderr


def test_windows_are_cut_by_document_and_batched_by_length() -> None:
    import tiny_models

    ids = windows(tiny_models.tokenizer(), "abcdefg<|endoftext|>xy<|endoftext|> \n<|endoftext|>hij", 4, 10)
    assert [len(window) for window in ids] == [4, 4, 2, 3, 4]
    assert all(window[0] == 1 for window in ids)
    assert [tuple(batch["input_ids"].shape) for batch in batches(ids, 2)] == [(2, 4), (1, 4), (1, 2), (1, 3)]


def test_the_table_has_everything_and_the_file_too(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    arguments = (
        "eval", "tiny_models:llama", "--text", text, "--protocol", "windows", "--window", 8, "--limit", 3,
        "--scheme", "w8a8", "--scheme", "w8a8o16", "--output", output, *FAST,
    )  # fmt: skip
    shown = mixq(*arguments).stdout
    assert "…" not in shown, "a figure was cut off"
    for heading in ("perplexity", "change %", "KL", "top-1 %", "16 bit %", "w8a8"):
        assert heading in shown
    result = json.loads(output.read_text())
    assert result["complete"]
    full, plain, outliers = result["rows"]
    assert (full["kl"], plain["time_beside_w8a8"]) == (None, 1.0)
    for row in (plain, outliers):
        assert row["kl"] > 0
        assert 0 < row["top1"] <= 1
        assert 8 < row["bits_per_weight"] < 32
        assert row["delta_share_error"] is not None


def test_what_is_scored_may_not_choose_the_columns(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text())
    arguments = ("eval", "tiny_models:llama", "--text", text, "--calibrate-text", copy, *FAST)
    assert "is the text that is scored" in mixq(*arguments, code=2).stderr


def test_the_file_needs_a_folder(text: Path) -> None:
    arguments = ("eval", "tiny_models:llama", "--text", text, "--output", "/nowhere/f.json", *FAST)
    assert "there is no folder /nowhere" in mixq(*arguments, code=2).stderr


def test_schemes_take_turns_where_memory_holds_few_models(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other the figures are the same; where the reference must go, KL alone is missing."""
    arguments = (
        "eval", "tiny_models:llama", "--text", text, "--protocol", "windows", "--window", 8, "--limit", 2,
        "--scheme", "w8a8", "--scheme", "w8a8o16", "--scheme", "w8a16", *FAST,
    )  # fmt: skip
    found = {}
    for count in (4, 1, 0):
        monkeypatch.setattr(Evaluation, "_together", lambda self, loaded, count=count: count)
        found[count] = mixq_json(*arguments)["rows"]
    assert "w8a16" in mixq(*arguments).stdout
    assert [row["label"] for row in found[0]] == ["float32", "w8a8", "w8a8o16", "w8a16"]
    for together, alone, without in zip(*found.values(), strict=True):
        assert alone["perplexity"] == pytest.approx(together["perplexity"], rel=1e-6)
        assert without["perplexity"] == pytest.approx(together["perplexity"], rel=1e-6)
        if together["scheme"] != "none":
            assert alone["kl"] == pytest.approx(together["kl"], rel=1e-3)
            assert without["kl"] is None
            assert without["delta_share"] == pytest.approx(together["delta_share"], abs=1e-6)
            assert "need both models in memory" in without["notes"][0]


def test_memory_says_how_many_models_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny_models

    model, _ = tiny_models.llama()
    loaded = LoadedModel("m", model, None)
    size = sum(tensor.nbytes for tensor in model.parameters())
    for free, count in ((100 * size, 4), (6 * size, 2), (3 * size, 1), (2 * size, 0), (None, 4)):
        monkeypatch.setattr(evaluating, "free_bytes", lambda device, free=free: free)
        assert Evaluation._together(None, loaded) == count, f"{free} bytes"  # type: ignore[arg-type]
