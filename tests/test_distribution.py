"""The wheel and the sdist, installed without the source tree: the backend is found by name and quantizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import warnings, torch
linear = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval().requires_grad_(False)
x = torch.randn(4, 64)
options = {"force": True, "lowering": "eager"}
result = torch.compile(linear, backend="mixq", options=options)(x)
import mixq_compile
from mixq_compile.inspection.html import render_html
from mixq_compile.kernels.cpu.build import SOURCES, MAIN_SOURCE
assert (SOURCES / MAIN_SOURCE).is_file()
assert float((result - linear(x)).norm() / linear(x).norm()) < 0.05
print(mixq_compile.__file__)
print(len(mixq_compile.report(linear).quantized))
"""


def run(*command: object, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    ran = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**kept, **environment},
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
    return ran.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a release, without those that tests and builds leave behind."""
    folder = tmp_path_factory.mktemp("source") / "mixq-compile"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "mixq_compile", folder / "mixq_compile", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    return folder


def built(source: Path, target: Path, hook: str) -> Path:
    """What setuptools makes of the source by `build_wheel` or `build_sdist`."""
    pytest.importorskip("setuptools.build_meta")
    target.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=source
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return next(target.iterdir())


@pytest.fixture(scope="module", params=["build_wheel", "build_sdist"])
def installed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which the distribution is installed, beside this one's dependencies."""
    folder = tmp_path_factory.mktemp(request.param)
    distribution = built(source, folder / "dist", request.param)
    if request.param == "build_sdist":
        shutil.unpack_archive(distribution, folder / "unpacked")
        distribution = built(next((folder / "unpacked").iterdir()), folder / "again", "build_wheel")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(distribution) as archive:
        archive.extractall(own)
    # torch and the others, without the editable install of this package.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in Path(sysconfig.get_path("purelib")).glob("__editable__*mixq*"):
        (own / name.name).write_text("")
    return python


def test_the_backend_is_found_by_name_and_quantizes(installed: Path, tmp_path: Path) -> None:
    path, quantized = run(installed, "-c", SCRIPT, HOME=str(tmp_path)).split()
    assert Path(path).is_relative_to(installed.parents[1])
    assert quantized == "1"


def test_the_distribution_holds_what_is_no_python(installed: Path) -> None:
    package = next(installed.parents[1].glob("lib/python*/site-packages/mixq_compile"))
    kept = {path.suffix for path in ROOT.joinpath("mixq_compile").rglob("*") if path.is_file()} - {
        ".pyc",
        ".so",
    }
    assert {path.suffix for path in package.rglob("*") if path.is_file()} >= kept
    for suffix in sorted(kept - {".py"}):
        names = {path.relative_to(ROOT) for path in ROOT.joinpath("mixq_compile").rglob(f"*{suffix}")}
        assert {path.relative_to(package.parent) for path in package.rglob(f"*{suffix}")} == names
