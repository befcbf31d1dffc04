"""How much error quantization adds to each layer by itself, on what the model really feeds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile import MixqLinear
from mixq_compile.evaluation import sqnr
from mixq_compile.scheme import QuantScheme

MOST_DB = 300.0
"""Beyond what float64 resolves."""


@dataclass(frozen=True)
class LayerError:
    """One layer, quantized alone, on inputs from the model in full precision."""

    sqnr_db: float
    """Within ±MOST_DB, so that JSON can hold it: the most where the layer is exact, the least for NaN."""
    found_columns: int
    """Outlier columns that its inputs had."""


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    schemes: Mapping[str, QuantScheme],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    columns: Mapping[str, list[int]],
    announce: Callable[[str], None] = lambda fqn: None,
) -> dict[str, LayerError]:
    """Runs the model once and quantizes each layer of `schemes` on the input that it gets.

    `columns` are calibrated outlier columns by layer. A layer that did not run, or that is no module of
    this name, is left out. Errors of one layer do not reach the next: every layer sees the original
    model's values. `announce` is told each layer as it is done.
    """
    found: dict[str, LayerError] = {}
    modules = dict(model.named_modules())

    def measure(fqn: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if fqn in found:
            return
        quantized = MixqLinear.from_linear(module, schemes[fqn], columns=columns.get(fqn), keep_original=True)
        result = quantized(inputs[0])
        found[fqn] = LayerError(_bounded(sqnr(output, result)), len(quantized.outlier_state().columns()))
        announce(fqn)

    handles = []
    try:
        for fqn in schemes:
            module = modules.get(fqn)
            if module is not None and isinstance(getattr(module, "weight", None), Tensor):

                def hook(module: nn.Module, inputs: Any, output: Any, fqn: str = fqn) -> None:
                    measure(fqn, module, inputs, output)

                handles.append(module.register_forward_hook(hook))
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _bounded(decibels: float) -> float:
    return -MOST_DB if math.isnan(decibels) else max(-MOST_DB, min(MOST_DB, decibels))
