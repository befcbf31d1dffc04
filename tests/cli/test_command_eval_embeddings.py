"""`mixq eval --protocol embeddings`: an encoder beside itself in full precision, on lines of a text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from commands import mixq, mixq_json

MODEL = "tiny_models:encoder"
FAST = ("--force", "--lowering", "eager", "--device", "cpu", "--window", 8, "--batch", 4)


def written(path: Path, seed: int, lines: int = 12) -> Path:
    words = random.Random(seed)
    rows = [" ".join(words.choice(("ball", "sun", "tree", "dog")) for _ in range(9)) for _ in range(lines)]
    path.write_text("\n".join(["= Heading =", "", *rows, "short"]))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return written(tmp_path / "text.txt", 1)


def test_schemes_stand_beside_full_precision(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    schemes = ("--scheme", "w8a8", "--scheme", "w8a8o16", "--scheme", "w8a16")
    found = mixq_json(
        "eval", MODEL, "--text", text, "--protocol", "embeddings", "--output", output, *schemes, *FAST
    )
    full, plain, default, weights = found["rows"]
    assert (found["documents"], found["batch"], found["window"]) == (12, 4, 8), "headings and short lines"
    assert full["relative_error"] < 1e-5
    assert full["cosine"] == pytest.approx(1)
    assert 0 < weights["relative_error"] < default["relative_error"] <= plain["relative_error"] < 0.1
    assert all(row["cosine"] > 0.99 for row in found["rows"])
    assert plain["time_beside_w8a8"] == 1
    assert default["speedup"] == pytest.approx(full["seconds"] / default["seconds"])
    assert output.read_text().count("relative_error") == 4


def test_a_limit_takes_the_first_lines(text: Path) -> None:
    found = mixq_json("eval", MODEL, "--text", text, "--protocol", "embeddings", "--limit", 4, *FAST)
    assert found["documents"] == 4


def test_calibrated_schemes_take_another_text(text: Path, tmp_path: Path) -> None:
    given = ("eval", MODEL, "--text", text, "--protocol", "embeddings", "--scheme", "auto8", *FAST)
    refused = mixq(*given, code=2)
    assert "--calibrate-text" in refused.stderr
    same = mixq(*given, "--calibrate-text", text, code=2)
    assert "better than it is" in same.stderr
    row = mixq_json(*given, "--calibrate-text", written(tmp_path / "other.txt", 2))["rows"][1]
    assert row["quantized"] > 0
    assert any("calibrated on" in note for note in row["notes"])


def test_texts_without_lines_and_language_models_are_refused(text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("too short\n")
    refused = mixq("eval", MODEL, "--text", empty, "--protocol", "embeddings", *FAST, code=2)
    assert "lines of 4 words or more" in refused.stderr
    refused = mixq("eval", "tiny_models:llama", "--text", text, "--protocol", "embeddings", *FAST, code=1)
    assert "last_hidden_state" in refused.stderr
    refused = mixq("eval", MODEL, "--text", text, "--protocol", "embeddings", "--generate", 3, *FAST, code=2)
    assert "language models" in refused.stderr


def test_the_encoder_in_a_model_that_guesses_masked_words(text: Path) -> None:
    given = ("eval", "tiny_models:masked", "--text", text, "--protocol", "embeddings", *FAST)
    row = mixq_json(*given)["rows"][1]
    assert row["quantized"] > 0
    assert row["cosine"] > 0.99
