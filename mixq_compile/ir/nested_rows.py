"""The rows of a nested tensor as one ordinary tensor, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def nested_rows(x: Tensor) -> Tensor:
    """The rows `[rows, K]` of a nested tensor of either layout, of all its parts in order."""
    if x.layout is torch.jagged:
        return x.values().reshape(-1, x.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()])


def map_nested_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A nested tensor whose rows `[N]` are what `function` makes of the rows `[K]` of another.

    `function` takes all rows in one call. The layout and the sizes of the parts stay.
    """
    if x.layout is torch.jagged:
        nested: Any = x
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), nested.offsets(), nested.lengths()
        )
    parts = x.unbind()
    rows = function(nested_rows(x)).split([part.numel() // part.shape[-1] for part in parts])
    return torch.nested.as_nested_tensor(
        [found.reshape(*part.shape[:-1], -1) for found, part in zip(rows, parts, strict=True)]
    )
