"""Many layers that are alike take one line, and no column is broken or out of line."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.inspection.layer_tables import cost_table
from mixq_compile.inspection.layers import layers_of
from mixq_compile.inspection.text import print_history
from mixq_compile.runtime.report_tables import LinearReport, Report

FEATURES, LAYERS = 64, 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(FEATURES, 128), nn.Linear(128, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.lm_head = nn.Linear(FEATURES, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def test_a_report_folds_layers_that_are_alike():
    report = mixq.report(mixq.quantize(model()))
    text = str(report)
    assert f"layers.*.up_proj ×{LAYERS}" in text
    assert f"layers.*.down_proj ×{LAYERS}" in text
    assert "lm_head" in text
    assert len(text.splitlines()) < 12
    each = report.text(each=True)
    assert all(f"layers.{number}.up_proj" in each for number in range(LAYERS))
    assert len(report.linears) == 2 * LAYERS + 1


def test_layers_that_differ_stay_apart():
    swapped = mixq.quantize(model(), layers={"layers.3.up_proj": "w8a8"})
    lines = [line.split() for line in str(mixq.report(swapped)).splitlines() if "up_proj" in line]
    assert sorted((line[0], line[-4]) for line in lines) == [
        ("layers.*.up_proj", "w8a8o16"),
        ("layers.3.up_proj", "w8a8"),
    ]


def _linear(fqn: str, scheme: str, kernel: str, columns: int) -> LinearReport:
    return LinearReport(
        fqn=fqn, role="other", out_features=64, in_features=64, scheme=scheme, kernel=kernel, skip=None,
        outlier_weight_source="codes", capacity=128, outlier_columns=tuple(range(columns)), overflow=0,
        bytes_before=1, bytes_after=1, float_weight_kept=False,
    )  # fmt: skip


def test_columns_stay_in_line_whatever_their_texts():
    long = _linear("a", "w4a8o16g128x", "a-long-kernel", 100)
    lines = str(Report(linears=(long, _linear("b", "w8a8", "cpu", 1)), graphs=0)).splitlines()
    head, *rows = [line for line in lines if "scheme" in line or line[:2] in ("a ", "b ")]
    for heading, texts in {"scheme": ("w4a8o16g128x", "w8a8"), "kernel": ("a-long-kernel", "cpu")}.items():
        assert [row.index(text) for row, text in zip(rows, texts, strict=True)] == [head.index(heading)] * 2
    assert len({len(row) for row in [head, *rows]}) == 1


def test_names_of_passes_are_not_broken_at_80_columns():
    _, history = mixq.compile(mixq.capture(model(), (torch.randn(2, FEATURES),)), force=True)
    shown = io.StringIO()
    print_history(history, Console(file=shown, width=80))
    names = [record.spec.partition("{")[0] for record in history.records]
    assert [name for name in names if name not in shown.getvalue()] == []
    assert max(map(len, shown.getvalue().splitlines())) <= 80


def test_explain_shows_layers_that_are_alike_once(tmp_path: Path):
    from typer.testing import CliRunner

    from mixq_compile.cli.app import app

    program = mixq.capture(model(), (torch.randn(2, FEATURES),))
    mixq.save(program, tmp_path / "model.pt2")
    result = CliRunner().invoke(app, ["explain", str(tmp_path / "model.pt2"), "up_proj", "--force"])
    assert result.exit_code == 0, result.output
    # The first layer differs: a guard call stood before it.
    assert result.output.count(f"layers.*.up_proj ×{LAYERS - 1}") == 1
    assert result.output.count("computed by") == 2


def test_the_measured_ratio_stands_beside_the_roofline():
    _, history = mixq.compile(mixq.capture(model(), (torch.randn(2, FEATURES),)), force=True)
    layers = [
        replace(layer, scheme=None, skip="not faster with cpu: 0.08x at 2 rows")
        if layer.fqn.endswith("up_proj") else layer
        for layer in layers_of(history)
    ]  # fmt: skip
    legend = cost_table(layers, each=False).legend
    assert legend == (
        f"measured, everything included: layers.*.up_proj ×{LAYERS} not faster with cpu: 0.08x at 2 rows"
    )
    assert cost_table(layers_of(history), each=False).legend == ""
