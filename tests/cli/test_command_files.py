"""Files and streams that cannot be written or read, and encodings that lack a character: one message each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import HERE, mixq

import mixq_compile
from mixq_compile.errors import MixqError

ROOT = str(Path(mixq_compile.__file__).parents[1])


def process(
    *arguments: str, stdout: object = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from mixq_compile.cli import main; main()", *arguments]
    return subprocess.run(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": ROOT, **environment},
    )


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_stdout_is_one_message():
    with FULL.open("w") as full:
        ran = process("pipelines", stdout=full)
    assert ran.returncode == 1
    shown = ran.stderr.decode()
    assert "No space left on device" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("command", ["pipelines", "passes"])
def test_an_encoding_without_a_character_gets_a_similar_one(command):
    ran = process(command, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.decode("ascii")


def test_the_times_sign_is_an_x_in_ascii():
    script = (
        "import sys; from mixq_compile.cli.running import write_in_any_encoding as any_encoding;"
        "any_encoding(sys.stdout, sys.stderr); print('2 × 3 → 6 …')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, cwd=HERE,
        env={**os.environ, "PYTHONPATH": ROOT, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert ran.stdout.decode("ascii").strip() == "2 x 3 -> 6 ..."


def test_an_empty_file_of_text_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    result = mixq(
        "calibrate", "no-such-model", "--text", tmp_path / "empty.txt", "--output", tmp_path / "o", code=2
    )
    assert "holds no text" in result.output


def test_a_file_that_cannot_be_read_is_one_message(tmp_path):
    from mixq_compile.cli.running import command

    def failing() -> None:
        (tmp_path / "missing" / "file").write_text("")

    with pytest.raises(typer.Exit) as caught:
        command(failing)()
    assert caught.value.exit_code == 1


def test_an_error_of_a_closed_pipe_stays_one():
    from mixq_compile.cli.running import _file_problem

    assert _file_problem(BrokenPipeError(32, "Broken pipe")) is None
    assert isinstance(_file_problem(PermissionError(13, "Permission denied", "report.html")), MixqError)


def unwritable(folder: Path) -> list[tuple[Path, str]]:
    """Names of files that cannot be written, and what is said of each."""
    (folder / "file").write_text("")
    return [
        (folder / "absent" / "out", "there is no folder"),
        (folder, "is a directory"),
        (folder / "file" / "out", "there is no folder"),
        (Path("/proc/out"), "nothing can be written"),
    ]


@pytest.mark.parametrize("place", range(4))
def test_a_file_that_cannot_be_written_is_told_before_the_work(place, tmp_path):
    path, message = unwritable(tmp_path)[place]
    (tmp_path / "text").write_text("a story")
    commands = (
        ("calibrate", "no-such-model", "--text", tmp_path / "text", "--output", path),
        ("inspect", "no-such-model", "--html", path),
        ("inspect", "no-such-model", "--json", path),
    )
    for command in commands:
        assert message in " ".join(mixq(*command, code=2).output.split())


def test_a_folder_that_cannot_be_written_is_told_before_the_work():
    result = mixq("bisect", "no-such-model", "--sqnr", "20", "--output", "/proc/out", code=2)
    assert "nothing can be written" in result.output


def test_a_quantized_model_is_told_before_it_is_loaded(tmp_path):
    from mixq_compile.cli.models import MANIFEST

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / MANIFEST).write_text("{}")
    (tmp_path / "text").write_text("a story")
    arguments = ("calibrate", tmp_path / "model", "--text", tmp_path / "text", "--output", tmp_path / "out")
    assert "is quantized already" in mixq(*arguments, code=2).output


@pytest.mark.parametrize("name", ["llama-2-7bb", "llama2-7b", "Llama-2-70B"])
def test_a_misspelt_known_shape_is_told_with_the_nearest_and_all(name):
    shown = " ".join(mixq("layers", name, code=2).output.split())
    assert "Did you mean 'llama-2-7" in shown
    assert "Known shapes, which need no weights: " in shown
