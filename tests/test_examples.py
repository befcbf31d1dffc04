"""Every program in examples/ runs from the shell and says what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SAYS = {
    "ahead_of_time": "relative error of the output: 0.00",
    "compile_a_model": "2 of 2 linears quantized",
    "write_a_pass": "tanh in place of erf",
}


def test_each_example_is_known_here() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(example: Path) -> None:
    result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert SAYS[example.stem] in result.stdout
