import importlib
import io
import sys

import pytest
import torch
from captures import TwoLayers, capture
from rich.console import Console
from throwaway_passes import REGISTRY

from mixq_compile.inspection import text
from mixq_compile.inspection.program import program_text
from mixq_compile.inspection.shown_history import ShownHistory
from mixq_compile.inspection.text import (
    operator_changes,
    print_diff,
    print_history,
    print_patch,
    print_program,
)
from mixq_compile.pipeline import Fuel, History, PassContext, Pipeline


@pytest.fixture
def history() -> History:
    graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
    pipeline = Pipeline.parse("annotate-linears{ignore=second},negate-twice", REGISTRY)
    return pipeline.run(graph, PassContext(fuel=Fuel(2)))


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120, color_system=None)


def printed(console: Console) -> str:
    return console.file.getvalue()


def test_a_history_is_a_table_of_passes(history: History, console: Console) -> None:
    print_history(history, console)
    shown = printed(console)
    (first,) = (line for line in shown.splitlines() if "annotate-linears{" in line)
    (second,) = (line for line in shown.splitlines() if "negate-twice" in line)
    assert "~1" in first
    assert "+2" in second
    assert "fuel spent" in second
    assert "2 passes" in shown


def test_a_history_prints_itself(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    ShownHistory.of(history).print()
    assert "negate-twice" in capsys.readouterr().out


def test_no_color_is_respected(
    history: History, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_diff(history.records[1].diff)
    assert "\x1b[3" not in capsys.readouterr().out


def test_a_program_line_shows_type_shape_and_scheme(history: History, console: Console) -> None:
    print_program(history.final, console)
    lines = printed(console).splitlines()
    assert any("aten.linear.default(" in line and "# float32[2, 16] | w8a8o16" in line for line in lines)


def test_brackets_in_a_program_are_text_and_no_markup(history: History, console: Console) -> None:
    print_program(history.final, console)
    assert printed(console) == program_text(history.final)


def test_the_captured_graph_is_the_first_line_of_the_table(history: History, console: Console) -> None:
    print_history(history, console)
    assert history.initial is not None
    (line,) = (line for line in printed(console).splitlines() if "as captured" in line)
    assert str(len(history.initial.rows)) in line


def test_a_patch_shows_the_layers_of_its_changes(history: History, console: Console) -> None:
    diff = history.records[1].diff
    assert diff is not None
    count = print_patch(history.snapshot(1), diff, lambda row: row.fqn == "first", console)
    lines = printed(console).splitlines()
    assert lines[0] == "@@ first"
    assert count == sum(line[0] in "+-" for line in lines) > 0


def test_operators_that_are_called_more_or_less_often_are_counted(history: History) -> None:
    assert operator_changes(history) == [("aten.neg.default", 0, 2)]


def test_a_difference_is_a_patch(history: History, console: Console) -> None:
    print_diff(history.records[1].diff, console)
    signs = [line[0] for line in printed(console).splitlines()]
    assert signs.count("+") == 3
    assert signs.count("-") == 1


def test_rich_is_imported_only_to_print(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    reloaded = importlib.reload(text)
    with pytest.raises(ImportError):
        reloaded.print_history(history)
