import json
import subprocess
import sys

import pytest
from commands import mixq, mixq_process

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


def test_no_color_is_respected() -> None:
    shown = mixq_process("pipelines", NO_COLOR="1", FORCE_COLOR="", COLUMNS="100").stdout
    assert "\x1b[3" not in shown
    assert "jit" in shown
