"""Compiling small models with the backend, for the tests of the runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FEATURES = 64
QUICK: dict[str, Any] = {"force": True, "kernel": "ref", "lowering": "eager"}
"""Options of a compilation that takes milliseconds."""


class Block(nn.Module):
    """A feed-forward block with a residual connection and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(FEATURES, 2 * FEATURES)
        self.down_proj = nn.Linear(2 * FEATURES, FEATURES)
        self.lm_head = nn.Linear(FEATURES, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x + self.down_proj(torch.relu(self.up_proj(x))))


def block(**changes: Any) -> Block:
    torch.manual_seed(0)
    return Block().eval().requires_grad_(False).to(**changes)


def rows(count: int = 6, *, columns: tuple[int, ...] = (), seed: int = 1, size: float = 12.0) -> Tensor:
    """Normal numbers within ±4, `size` in the given columns."""
    x = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed)).clamp_(-4, 4)
    x[:, list(columns)] = size
    return x


def compiled(model: Any, **options: Any) -> Any:
    """The model compiled with the backend, found by its name."""
    dynamic = options.pop("dynamic", None)
    fullgraph = options.pop("fullgraph", True)
    return torch.compile(
        model, backend="mixq", dynamic=dynamic, fullgraph=fullgraph, options={**QUICK, **options}
    )
