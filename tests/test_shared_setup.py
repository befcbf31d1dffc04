"""What `conftest.py` and `shared_data.py` promise to the other tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shared_data import shared_data

CONFTEST = Path(__file__).with_name("conftest.py")


def run_pytest(folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "test_sample.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--rootdir",
        str(folder),
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_a_test_class_without_a_test_fails_the_run(tmp_path: Path) -> None:
    source = "class TestMisnamed:\n    def checks_something(self): ...\n\ndef test_other(): ...\n"
    result = run_pytest(tmp_path, source)
    assert result.returncode != 0
    assert "TestMisnamed is named like a test class" in result.stdout


def test_a_test_class_with_a_test_passes(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "class TestNamed:\n    def test_something(self): ...\n")
    assert result.returncode == 0, result.stdout


def test_hugging_face_is_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_shared_data_is_found_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    monkeypatch.setenv("MIXQ_SHARED_DATA", str(tmp_path))
    assert shared_data("text") == tmp_path / "text"


def test_absent_shared_data_skips_and_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIXQ_SHARED_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(pytest.skip.Exception, match="MIXQ_SHARED_DATA"):
        shared_data("text")
