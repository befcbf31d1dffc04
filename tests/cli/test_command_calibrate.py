"""`mixq calibrate`: the kinds of statistics that it collects."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import mixq, mixq_json

from mixq_compile.calibration import CalibrationStats


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time, there was a cat. " * 40)
    return path


def test_kinds_asked_for_are_in_the_file(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "stats"
    options = ("--text", text, "--output", output, "--limit", 2, "--length", 16)
    found = mixq_json("calibrate", "tiny_models:llama", *options, "--kind", "gram", "--kind", "sample")
    assert found["kinds"] == ["channels", "gram", "sample"]
    stats = CalibrationStats.load(output)
    assert stats.kinds == ("channels", "gram", "sample")
    for fqn in stats:
        assert stats[fqn].gram.shape == (stats[fqn].in_features,) * 2
        assert stats[fqn].sample.shape == (stats[fqn].rows, stats[fqn].in_features)


def test_without_kinds_the_file_holds_channels(text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--output", tmp_path / "stats", "--limit", 2, "--length", 16)
    assert mixq_json("calibrate", "tiny_models:llama", *options)["kinds"] == ["channels"]
    assert CalibrationStats.load(tmp_path / "stats").kinds == ("channels",)


def test_an_unknown_kind_is_refused_before_the_model_loads(text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--output", tmp_path / "stats", "--kind", "hessian")
    shown = mixq("calibrate", "no_such_model", *options, code=2).stderr
    assert "unknown kind of statistics 'hessian'. Valid: channels, gram, sample." in " ".join(shown.split())


def test_the_help_names_the_kinds() -> None:
    shown = mixq("calibrate", "--help").stdout
    assert all(word in shown for word in ("--kind", "channels", "gram", "sample"))
