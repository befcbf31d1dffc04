"""Calls of `mixq` in this process and in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)


def mixq(*arguments: object, code: int = 0) -> Any:
    """The result of a call, whose exit code is checked."""
    from mixq_compile.cli.app import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
    return result


def mixq_json(*arguments: object, code: int = 0) -> Any:
    """What a call with `--json` writes to stdout, which must be JSON and nothing else."""
    return json.loads(mixq(*arguments, "--json", code=code).stdout)


def mixq_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A call in a process of its own."""
    command = [sys.executable, "-c", "from mixq_compile.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
