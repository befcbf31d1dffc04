from pathlib import Path

import pytest
from commands import mixq, mixq_process

from mixq_compile.errors import OptionError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a story")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demoo"], "Did you mean 'demo'"),
        (["demo", "--schem", "w8a8"], "--schem"),
        (["demo", "--scheme", "w8a8o61"], "Did you mean 'w8a8o16'"),
        (["demo", "--threshold", "0"], "must be above 0"),
        (["demo", "--threshold", "nan"], "must be above 0"),
        (["demo", "--dtype", "float23"], "Did you mean 'float32'"),
        (["demo", "--device", "cdua"], "unknown device 'cdua'"),
        (["demo", "--batch", "0"], "--batch"),
        (["quantize", "MODEL", "--output", "x", "--capacity", "20"], "multiple of 16"),
        (["quantize", "MODEL", "--output", "x", "--miss", "exakt"], "Did you mean 'exact'"),
        (["quantize", "MODEL", "--output", "x", "--layer", "down_proj"], "PATTERN=SCHEME"),
        (["quantize", "MODEL"], "--output"),
        (["passes", "select-shceme"], "Did you mean 'select-scheme'"),
        (["pipelines", "jti"], "Did you mean 'jit'"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    shown = " ".join(mixq(*arguments, code=2).output.replace("│", " ").split())
    assert message in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "gtpq"], "Did you mean 'gptq'"),
        (["--scheme", "w4a4"], "Did you mean 'w4a4o16'"),
        (["--scheme", "w4a4o16{thresold=3}"], "Did you mean 'threshold'"),
        (["--scheme", "w4a4o16{threshold=many}"], "must be a number, or a multiple"),
        (["--scheme", "w4a4o16{capacity=20}"], "multiple of 16"),
        (["--scheme", "w8a8,w8a16"], "takes one scheme"),
        (["--stats", "absent"], "does not exist"),
    ],
)
def test_usage_errors_of_eval(text: Path, arguments: list[str], message: str) -> None:
    shown = " ".join(
        mixq("eval", "MODEL", "--text", text, *arguments, code=2).output.replace("│", " ").split()
    )
    assert message in shown


def test_an_error_is_one_message(text: Path) -> None:
    shown = mixq_process("eval", "/nowhere/model", "--text", text)
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: /nowhere/model does not exist.")
    assert "Traceback" not in shown.stderr
    assert not shown.stdout


def test_debug_shows_where_an_error_comes_from(text: Path) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        mixq("eval", "/nowhere/model", "--text", text, "--debug")
