"""docs/adding.md does what it says: its files are written into a copy of the package, its `try_….py` run."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_layers import BELOW, imported_modules, target_layer

import mixq_compile

PACKAGE = Path(mixq_compile.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "adding.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"# (?P<append>append to )?(?P<path>[\w/]+\.py)\n")

RUN_ALL = """
import pathlib, runpy, sys, traceback
for path in sorted(pathlib.Path().glob("try_*.py")):
    try:
        runpy.run_path(str(path))
        print(f"@{path.stem} ran")
    except BaseException:
        print(f"@{path.stem} failed", traceback.format_exc(), sep="\\n")
"""


def blocks() -> list[tuple[str, bool, str]]:
    """Of each block of code: the file that it names, whether it is appended to it, and its text."""
    found = []
    for block in BLOCK.finditer(DOCUMENT.read_text()):
        code = block["code"]
        place = PLACE.match(code)
        assert place is not None, f"this block does not say which file it is:\n{code}"
        found.append((place["path"], place["append"] is not None, code))
    return found


TRIES = [path.removesuffix(".py") for path, _, _ in blocks() if path.startswith("try_")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the files of the document in it."""
    root = tmp_path_factory.mktemp("adding")
    shutil.copytree(PACKAGE, root / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, append, code in blocks():
        file = root / path
        if append:
            assert file.is_file(), f"the document appends to {path}, which does not exist"
            file.write_text(file.read_text() + code)
        else:
            assert not file.exists(), f"the document adds {path}, which exists already"
            file.parent.mkdir(exist_ok=True)
            file.write_text(code)
    return root


@pytest.fixture(scope="module")
def outcomes(tree: Path) -> Mapping[str, str]:
    """What became of each `try_….py`, run one after the other in one interpreter of the copy."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(part.partition(" ")[::2] for part in done.stdout.split("@")[1:])


@pytest.mark.parametrize("name", TRIES)
def test_what_the_document_adds_works(name: str, outcomes: Mapping[str, str]) -> None:
    assert outcomes[name].strip() == "ran", outcomes[name]


def test_every_kind_of_thing_is_tried() -> None:
    kinds = ("scheme", "pass", "operator", "kernel", "solver", "statistics")
    assert sorted(TRIES) == sorted(f"try_{kind}" for kind in kinds)


@pytest.mark.parametrize("path", [path for path, _, _ in blocks() if path.startswith("mixq_compile/")])
def test_what_is_added_imports_downwards(path: str, tree: Path) -> None:
    own = path.split("/")[1]
    for line, module in imported_modules(ast.parse((tree / path).read_text())):
        if module.startswith("mixq_compile."):
            target = target_layer(module)
            assert target == own or target in BELOW[own], f"{path}:{line}: {own} may not import {module}"


LISTED = """
import pathlib, mixq_compile
from mixq_compile.calibration.collected import KINDS
from mixq_compile.ops.providers import provider_names
from mixq_compile.pipeline import pass_names
from mixq_compile.scheme import SOLVERS
from mixq_compile.schemes.registry import scheme_names
assert pathlib.Path(mixq_compile.__file__).is_relative_to(pathlib.Path.cwd()), "not the copy"
print(*scheme_names(), *pass_names(), *provider_names(), *SOLVERS, *KINDS)
"""


def test_listings_show_them(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTED], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"w8a8o16_wide", "merge-relus", "plain", "narrow", "lowest"} <= set(done.stdout.split())


def test_names_in_the_text_exist() -> None:
    """What stands in backquotes as a file of the package, or of the tests."""
    added = {path for path, _, _ in blocks()}
    text = BLOCK.sub("", DOCUMENT.read_text())
    for name in re.findall(r"`((?:[\w]+/)+[\w]+\.(?:py|md))`", text):
        candidates = (PACKAGE / name, PACKAGE.parent / name)
        assert name in added or any(path.exists() for path in candidates), f"{name} does not exist"
