"""The line at the end of a test run that says what was skipped for what missing program."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# By its path: the folders of tests have files of this name too.
_SPEC = importlib.util.spec_from_file_location("outer_conftest", ROOT / "tests" / "conftest.py")
assert _SPEC is not None
assert _SPEC.loader is not None
_CONFTEST = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CONFTEST)
MISSING, skipped_for = _CONFTEST.MISSING, _CONFTEST.skipped_for


def test_reasons_are_counted_by_what_is_missing():
    reasons = [
        "Skipped: needs Icarus Verilog (apt-get install iverilog)",
        "Skipped: needs yosys and its library (apt-get install yosys qflow-tech-osu018)",
        "Skipped: needs yosys and its library (apt-get install yosys qflow-tech-osu018)",
        "could not import 'matplotlib': No module named 'matplotlib'",
    ]
    line = skipped_for(reasons)
    assert line.startswith("skipped for what is missing here: 2 for yosys")
    assert "1 for Icarus Verilog" in line
    assert "1 for matplotlib" in line
    assert "\n" not in line


def test_nothing_skipped_says_nothing():
    assert skipped_for([]) == ""


def test_whatever_is_missing_comes_with_how_to_get_it():
    assert [text for text in MISSING.values() if "(" not in text] == ["an NVIDIA GPU"]


def test_what_pip_can_install_for_tests_belongs_to_dev_and_is_pinned():
    project = (ROOT / "pyproject.toml").read_text()
    dev = project.partition("dev = [")[2].partition("]")[0]
    pinned = (ROOT / "constraints.txt").read_text()
    for name in ("matplotlib", "numpy", "playwright"):
        assert f'"{name}>=' in dev
        assert re.search(rf"^{name}==", pinned, re.MULTILINE)
