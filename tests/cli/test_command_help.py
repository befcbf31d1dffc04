import json
import subprocess
import sys

import pytest
from commands import mixq

import mixq_compile
from mixq_compile.cli.app import COMMANDS

HEAVY = ("torch", "triton", "transformers")
LIGHT_CALL = """
import json, sys
from mixq_compile.cli import main
sys.argv = ["mixq", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
sys.stderr.write(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def test_help_of_every_command_loads_nothing_heavy() -> None:
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    for arguments in calls:
        source = LIGHT_CALL.format(arguments=arguments, heavy=HEAVY)
        result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stderr.splitlines()[-1]) == [], arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str) -> None:
    shown = mixq(name, "--help").stdout
    assert f"Example: mixq {name}" in shown
    assert "--json" in shown


def test_help_lists_every_command() -> None:
    shown = mixq("--help").stdout
    assert all(name in shown for name in COMMANDS)


def test_version() -> None:
    assert mixq("--version").stdout == f"mixq-compile {mixq_compile.__version__}\n"


@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    colour = "\x1b[36m"
    assert (colour in mixq("passes", "select-scheme").stdout) is not no_color
