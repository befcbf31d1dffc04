"""Where compiled kernels and measurements are kept: with a home, without one, and read-only."""

from __future__ import annotations

import ast
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mixq_compile.area import synthesis
from mixq_compile.cache_folder import CACHE_VARIABLE, cache_directory, cached, writable_cache_directory
from mixq_compile.cli import doctor
from mixq_compile.kernels.cpu import build
from mixq_compile.kernels.tl.speed_table import SpeedTable, cache_file, save

PACKAGE = Path(build.__file__).parents[2]


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of temporary files of its own, no variables that name a cache."""
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def nobody(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a container: no HOME, and a user id that no account has."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    return temporary


def test_a_user_without_a_home_has_a_cache_of_temporary_files(nobody):
    assert cache_directory() == nobody / f"mixq_compile_{os.getuid()}"
    made = writable_cache_directory()
    assert made == cache_directory()
    assert stat.S_IMODE(made.stat().st_mode) & 0o022 == 0


def test_every_cache_finds_its_place_without_a_home(nobody):
    folder = nobody / f"mixq_compile_{os.getuid()}"
    assert build.cache_directory() == folder
    assert save(SpeedTable("a GPU")) == cache_file("a GPU")
    assert cache_file("a GPU").parent == folder
    assert synthesis._cache_directory() == folder / "synthesis"
    assert doctor._inductor_cache() == nobody / f"torchinductor_uid_{os.getuid()}"


def test_a_cache_that_cannot_be_written_is_replaced_by_the_same_folder_each_time(temporary, monkeypatch):
    blocked = temporary / "file"
    blocked.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked / "folder"))
    first = writable_cache_directory()
    (first / "kept").write_text("")
    assert writable_cache_directory() == first
    assert cached("kept") == first / "kept"
    assert save(SpeedTable("a GPU")) == cache_file("a GPU")


def test_what_others_can_write_is_not_trusted(temporary, monkeypatch):
    blocked = temporary / "file"
    blocked.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked / "folder"))
    foreign = temporary / f"mixq_compile_{os.getuid()}"
    foreign.mkdir()
    foreign.chmod(0o777)
    (foreign / "library.so").write_text("")
    assert cached("library.so") == blocked / "folder" / "library.so"
    assert writable_cache_directory() != foreign


def test_a_file_in_a_cache_that_is_only_read_is_found(temporary, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(temporary / "shared"))
    (temporary / "shared").mkdir()
    (temporary / "shared" / "kept").write_text("")
    assert cached("kept") == temporary / "shared" / "kept"


def test_a_model_is_quantized_by_a_user_without_a_home(tmp_path):
    """In a process of its own, since kernels are loaded once."""
    script = (
        "import pwd, torch, tempfile\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "import mixq_compile\n"
        "model = mixq_compile.quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)))\n"
        "print(model(torch.ones(2, 32)).shape)\n"
    )
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {**kept, "TMPDIR": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.stdout.strip() == "torch.Size([2, 32])", ran.stderr[-2000:]


def test_no_other_file_of_the_package_asks_for_the_home():
    asking = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Path.home", "os.path.expanduser")
    ]
    assert asking == ["cache_folder.py"]
