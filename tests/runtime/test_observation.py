"""What a running backend shows: report files, torch's structured trace, the log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import QUICK, block, compiled, rows

import mixq_compile as mixq
from mixq_compile.errors import OptionError
from mixq_compile.inspection.files import load_inspection

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from compiling import block, compiled, rows
compiled(block(), dynamic=False)(rows(6))
"""


def run(**environment: str) -> str:
    """What a process that compiles a block writes to stderr under these variables."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "runtime")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    return done.stderr


def test_a_report_holds_every_graph_by_its_compile_id(tmp_path: Path) -> None:
    torch._dynamo.reset()
    path = tmp_path / "report.html"
    fast = compiled(block(), dynamic=False, report=str(path))
    fast(rows(6))
    fast(rows(9))
    inspection = load_inspection(path)
    assert inspection.model == "a compiled model", "the block's own modules are torch's"
    assert len(inspection.graphs) == 2
    assert len({graph.name for graph in inspection.graphs}) == 2, "two graphs have one name"
    assert all(graph.name.endswith(("/0", "/1")) for graph in inspection.graphs)
    assert "float32[6, 64]" in inspection.inputs
    assert "float32[9, 64]" in inspection.inputs
    for graph in inspection.graphs:
        assert [layer.fqn for layer in graph.layers] == ["up_proj", "down_proj", "lm_head"]


def test_a_report_is_named_after_the_outermost_module_of_the_users(tmp_path: Path) -> None:
    torch._dynamo.reset()
    path = tmp_path / "report.html"
    compiled(torch.nn.Sequential(block()), dynamic=False, report=str(path))(rows(6))
    assert load_inspection(path).model == "Block"


def test_a_report_in_a_folder_that_does_not_exist_is_refused_before_compiling(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="does not exist: make it first"):
        mixq.MixqOptions(report=str(tmp_path / "absent" / "report.html"))


def test_a_path_object_is_taken_too(tmp_path: Path) -> None:
    options = mixq.MixqOptions.from_user(options={**QUICK, "report": tmp_path / "report.html"})
    assert options.report == str(tmp_path / "report.html")


def test_torch_logs_shows_passes_decisions_and_the_program() -> None:
    shown = run(TORCH_LOGS="+mixq_compile")
    assert "pass 5 rewrite-mixed-linear" in shown
    assert "applied up_proj: scheme w8a8o16" in shown
    assert "skipped lm_head: ignored: its name matches 'lm_head'" in shown
    assert "def forward(self" in shown


def test_without_it_nothing_is_logged() -> None:
    assert "rewrite-mixed-linear" not in run()


def test_a_structured_trace_has_an_artifact_for_each_pass_that_changed_the_graph(tmp_path: Path) -> None:
    run(TORCH_TRACE=str(tmp_path))
    (trace,) = tmp_path.iterdir()
    written = trace.read_text()
    assert '"mixq_after_00_capture"' in written
    assert '"mixq_after_05_rewrite-mixed-linear"' in written
    assert '"mixq_after_13_verify"' not in written
    assert "torch.ops.mixq.quantize_online.default" in written


def test_a_history_is_saved_as_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    program = mixq.capture(block(), rows(6))
    _, history = mixq.compile(program, force=True, kernel="ref")
    history.save_html(path, "a block")
    inspection = load_inspection(path)
    assert inspection.model == "a block"
    assert inspection.graphs[0].history.to_json() == history.to_json()
