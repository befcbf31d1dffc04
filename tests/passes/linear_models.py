"""Small models for the tests of passes, with outliers planted in their inputs."""

from __future__ import annotations

from typing import Any

import torch
from captures import capture
from torch import Tensor, nn

from mixq_compile.calibration import CalibrationStats, LinearStatistics
from mixq_compile.ir.graph import CapturedGraph

FEATURES = 64


class Attention(nn.Module):
    """Three linears that read one value, and one that reads what they make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(FEATURES, FEATURES)
        self.k_proj = nn.Linear(FEATURES, 32, bias=False)
        self.v_proj = nn.Linear(FEATURES, 32, bias=False)
        self.o_proj = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.cat([self.k_proj(x), self.v_proj(x)], dim=-1)
        return self.o_proj(torch.sigmoid(self.q_proj(x)) * mixed)


class Network(nn.Module):
    """An attention block and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.lm_head = nn.Linear(FEATURES, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x + self.attn(x))


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


def rows(*shape: int, columns: tuple[int, ...] = (), seed: int = 1) -> Tensor:
    """Normal numbers within ±4, twelve in the given columns."""
    x = torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(seed)).clamp_(-4, 4)
    x[..., list(columns)] = 12.0
    return x


def captured(model: nn.Module, route: str, *inputs: Tensor, **options: Any) -> CapturedGraph:
    return capture(model, *(inputs or (rows(6),)), route=route, **options)


def statistics(maxima: dict[str, dict[int, float]], features: int = FEATURES) -> CalibrationStats:
    """Statistics in which each linear's input reaches 2, and the given columns what is given."""
    linears = {}
    for fqn, columns in maxima.items():
        absmax = torch.full((features,), 2.0)
        for column, value in columns.items():
            absmax[column] = value
        linears[fqn] = LinearStatistics(
            fqn=fqn,
            absmax=absmax,
            mean_magnitude=absmax / 2,
            mean_square=absmax.square() / 3,
            rows=10,
            nonfinite_rows=0,
            rows_above=(absmax > 6.0).long()[None] * 10,
        )
    return CalibrationStats(
        linears=linears,
        never_run=(),
        thresholds=(6.0,),
        model_class="Network",
        dtype="float32",
        package_version="0",
    )


ATTENTION = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj")
