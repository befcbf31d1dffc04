"""`mixq bisect`: finds the rewrite that broke a model, and leaves a folder that shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import mixq, mixq_json

from mixq_compile.pipeline.registry import default_registry

PROJECT = Path(__file__).resolve().parents[2]
CHECK = """
import json, sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith("models/model.json"))
    program = json.loads(archive.read(name))
names = [node["inputs"][0]["arg"]["as_tensor"]["name"] for node in program["graph_module"]["graph"]["nodes"]]
print("subtracted from:", *names)
sys.exit(any(name.startswith("p_") for name in names))
"""
"""Rejects a program that subtracts anything from a parameter."""


@pytest.fixture(autouse=True)
def registry_of_its_own() -> Iterator[None]:
    """The passes of this test are not those of the next."""
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "reproducer"


@pytest.fixture
def check(tmp_path: Path) -> str:
    path = tmp_path / "check.py"
    path.write_text(CHECK)
    return f"{sys.executable} {path} {{}}"


def arguments(folder: Path, pipeline: str = "rewrite-subtractions", model: str = "differences") -> list[Any]:
    chosen = ("--load", "broken_passes", "--pipeline", pipeline, "--output", folder)
    return ["bisect", f"tiny_models:{model}", *chosen]


def reproduce(folder: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Runs a reproducer as someone would who has nothing but the folder and the package."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, folder / "reproduce.py"],
        capture_output=True, text=True, check=False, cwd=elsewhere, env=environment,
    )  # fmt: skip


def test_finds_the_rewrite_and_shows_it(folder: Path, tmp_path: Path) -> None:
    result = mixq(*arguments(folder), "--sqnr", 40)
    assert result.stdout.startswith("rewrite 5 of 12 broke it\n  pass: 1, rewrite-subtractions\n")
    for line in (
        "  decision: written anew",
        "  node: sub_4",
        "  layer: 4",
        "tiny_models.py",
        "  with 4 rewrites: good, SQNR inf dB",
        "  with 5 rewrites: bad, SQNR -",
        "- sub_4 = torch.ops.aten.sub.Tensor(sub_tensor_3, _4_offset)",
        "+ sub_tensor_4 = torch.ops.aten.sub.Tensor(_4_offset, sub_tensor_3)",
        f"python {folder}/reproduce.py",
    ):
        assert line in result.stdout

    shown = reproduce(folder, tmp_path)
    assert shown.returncode == 1, shown.stderr
    assert shown.stdout.startswith("rewrite 5\n  pass: 1, rewrite-subtractions\n")
    assert "+ sub_tensor_4 = torch.ops.aten.sub.Tensor(_4_offset, sub_tensor_3)" in shown.stdout
    assert "with 5 rewrites: bad, SQNR -" in shown.stdout


def test_takes_few_runs_and_says_each(folder: Path) -> None:
    said = mixq(*arguments(folder), "--sqnr", 40).stderr.splitlines()
    runs = [line.partition(" rewrites: ") for line in said if " of 12 rewrites: " in line]
    assert [start for start, _, _ in runs] == [f"{fuel} of 12" for fuel in (12, 0, 6, 3, 4, 5)]
    assert [outcome.split(",")[0] for _, _, outcome in runs] == ["bad", "good", "bad", "good", "good", "bad"]


def test_as_json(folder: Path) -> None:
    found = mixq_json(*arguments(folder), "--sqnr", 40)
    assert (found["rewrite"], found["rewrites"]) == (5, 12)
    assert found["pass"] == {"index": 1, "spec": "rewrite-subtractions"}
    assert found["decision"]["fqn"] == "4"
    assert [row["name"] for row in found["diff"]["added"]] == ["sub_tensor_4"]
    assert found["failure"] is None
    assert found["reproducer"] == str(folder)
    assert [run["rewrites"] for run in found["runs"]] == [12, 0, 6, 3, 4, 5]
    good, bad = found["runs"][4:]
    assert (good["good"], good["sqnr_db"]) == (True, "inf")
    assert not bad["good"]
    assert bad["sqnr_db"] < 40


def test_culprit_is_kept_as_text(folder: Path) -> None:
    shown = mixq(*arguments(folder), "--sqnr", 40).stdout
    assert shown.startswith((folder / "culprit.txt").read_text())


def test_a_rewrite_of_a_later_pass(folder: Path) -> None:
    text = "rewrite-subtractions{swap=0},rewrite-subtractions{swap=2}"
    found = mixq_json(*arguments(folder, text), "--sqnr", 40)
    assert (found["rewrite"], found["rewrites"]) == (14, 24)
    assert found["pass"] == {"index": 2, "spec": "rewrite-subtractions{swap=2}"}


def test_fuel_is_the_most_to_look_at(folder: Path) -> None:
    assert mixq_json(*arguments(folder), "--sqnr", 40, "--fuel", 7)["rewrites"] == 7
    result = mixq(*arguments(folder.with_name("other")), "--sqnr", 40, "--fuel", 4, code=1)
    assert "with all 4 rewrites the result is good: there is nothing to find" in result.stderr


def test_quantization_is_found_as_what_is_not_exact(folder: Path) -> None:
    options = ("--force", "--batch", "1x8", "--sqnr", 200, "--output", folder)
    found = mixq_json("bisect", "tiny_models:llama", *options)
    assert found["pass"]["spec"] == "rewrite-mixed-linear"
    assert found["decision"]["fqn"] == "model.layers.0.self_attn.q_proj"


class TestCheck:
    def test_finds_the_same_rewrite(self, folder: Path, check: str) -> None:
        found = mixq_json(*arguments(folder), "--check", check)
        assert found["rewrite"] == 5
        assert [run["reason"] for run in found["runs"][4:]] == ["exit code 0", "exit code 1"]
        assert (folder / "check" / "check.py").is_file()

    def test_its_output_is_shown_on_request(self, folder: Path, check: str) -> None:
        quiet = mixq(*arguments(folder, "rewrite-subtractions{swap=1}"), "--fuel", 1, "--check", check)
        assert "subtracted from" not in quiet.output
        other = folder.with_name("other")
        verbose = mixq(
            *arguments(other, "rewrite-subtractions{swap=1}"), "--fuel", 1, "--check", check, "--verbose"
        )
        assert "subtracted from: p_0_offset" in verbose.stderr
        assert "subtracted from" not in verbose.stdout

    def test_one_that_cannot_tell_ends_the_search(self, folder: Path) -> None:
        result = mixq(*arguments(folder), "--check", "echo no data; exit 125", code=1)
        assert "the check cannot tell" in result.stderr
        assert "no data" in result.stderr
        assert not folder.exists()

    def test_one_that_does_not_exist_is_a_usage_error(self, folder: Path) -> None:
        assert "cannot run the check" in mixq(*arguments(folder), "--check", "pythno {}", code=2).stderr


class TestFailingPasses:
    def test_one_that_raises_is_found_as_bad(self, folder: Path) -> None:
        result = mixq(*arguments(folder, "rewrite-subtractions{swap=0},fail-at"), "--sqnr", 40)
        assert result.stdout.startswith("rewrite 15 of 15 broke it\n  pass: 2, fail-at\n")
        assert "with 15 rewrites: bad, pass 2, fail-at, failed" in result.stdout
        assert "why: ZeroDivisionError: scale is zero" in result.stdout

    def test_one_that_leaves_a_wrong_graph_is_found_as_bad(self, folder: Path) -> None:
        found = mixq_json(*arguments(folder, "lie-about-shape"), "--sqnr", 40)
        assert found["rewrite"] == 4
        assert "records float32[1, 4], its operator gives float32[2, 4]" in found["failure"]
        assert found["diff"]["changed"]

    def test_one_that_fails_before_it_rewrites_anything(self, folder: Path) -> None:
        result = mixq(*arguments(folder, "fail-at-once"), "--sqnr", 40, code=1)
        assert "without any rewrite the result is bad already" in result.stderr
        assert "pass 1, fail-at-once, failed" in result.stderr


def test_nothing_to_find(folder: Path) -> None:
    result = mixq(*arguments(folder, "rewrite-subtractions{swap=0}"), "--sqnr", 40, code=1)
    assert "with all 12 rewrites the result is good: there is nothing to find" in result.stderr
    assert "With 12 rewrites: good, SQNR inf dB." in result.stderr
    assert not folder.exists()


def test_a_check_that_rejects_the_model_itself(folder: Path) -> None:
    result = mixq(*arguments(folder), "--check", "false", code=1)
    assert "without any rewrite the result is bad already" in result.stderr
    assert "With 0 rewrites: bad, exit code 1." in result.stderr


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "--sqnr and --check are both missing"),
            (["--sqnr", 20, "--check", "true"], "--sqnr and --check exclude each other"),
            (["--sqnr", "nan"], "--sqnr takes a number of dB, not nan"),
            (["--check", " "], "--check takes a command"),
            (["--sqnr", 20, "--no-weights"], "captured without its weights"),
        ],
    )
    def test_options(self, folder: Path, options: list[Any], message: str) -> None:
        assert message in mixq(*arguments(folder), *options, code=2).stderr

    def test_a_folder_that_is_in_use(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        assert "has files in it" in mixq(*arguments(folder), "--sqnr", 20, code=2).stderr

    def test_a_model_without_figures_to_compare(self, folder: Path) -> None:
        result = mixq(*arguments(folder, model="positions"), "--sqnr", 20, code=2)
        assert "returns none: give --check" in result.stderr
