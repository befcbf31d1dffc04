"""What `import mixq_compile` and `mixq --help` load: neither torch, triton nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import mixq_compile

HEAVY = ("torch", "triton", "transformers")

REPORT = """
import json, sys
sys.stderr.write(json.dumps(sorted(name for name in {heavy!r} if name in sys.modules)))
"""


def loaded_by(statements: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has loaded after these statements."""
    result = subprocess.run(
        [sys.executable, "-c", statements + REPORT.format(heavy=HEAVY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded: list[str] = json.loads(result.stderr.splitlines()[-1])
    return loaded


@pytest.mark.parametrize("module", ["mixq_compile", "mixq_compile.scheme", "mixq_compile.errors"])
def test_import_is_light(module: str) -> None:
    assert loaded_by(f"import {module}") == []


REGISTRY = "mixq_compile.schemes.registry"


def test_listing_schemes_is_light() -> None:
    assert loaded_by(f"from {REGISTRY} import *; [get_scheme(n) for n in scheme_names()]") == []


def test_dir_shows_the_public_api_without_loading_it() -> None:
    assert loaded_by("import mixq_compile; assert 'quantize' in dir(mixq_compile)") == []


def test_help_of_the_command_line_is_light() -> None:
    statements = """
import sys
from mixq_compile.cli import main
sys.argv = ["mixq", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(statements) == []


@pytest.mark.parametrize("name", sorted(mixq_compile._HOME))
def test_each_public_name_is_found(name: str) -> None:
    assert getattr(mixq_compile, name).__module__.startswith("mixq_compile.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = mixq_compile.quantise


def test_the_backend_is_an_entry_point() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="mixq")
    assert found.value == "mixq_compile.runtime.backend:mixq_backend"


@pytest.mark.parametrize("command", ["passes", "pipelines"])
def test_listing_passes_loads_torch_and_no_algebra(command: str) -> None:
    """sympy, which torch needs for symbolic sizes, takes as long as half of torch."""
    script = f"""
import json, sys
from mixq_compile.cli import main
sys.argv = ["mixq", {command!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
sys.stderr.write(json.dumps([name for name in ("sympy", "triton", "transformers") if name in sys.modules]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert json.loads(result.stderr.splitlines()[-1]) == [], result.stderr
