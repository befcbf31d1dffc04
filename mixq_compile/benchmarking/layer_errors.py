"""How much error quantization adds to each layer by itself, on what the model really feeds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile import MixqLinear
from mixq_compile.area import LinearSize
from mixq_compile.benchmarking.simulated_schemes import SIMULATED, Problem
from mixq_compile.evaluation import sqnr
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights.recipe import InputStatistics

MOST_DB = 300.0
"""Beyond what float64 resolves."""


@dataclass(frozen=True)
class LayerError:
    """One layer, quantized alone, on inputs from the model in full precision."""

    sqnr_db: float
    """Within ±MOST_DB, so that JSON can hold it: the most where the layer is exact, the least for NaN."""
    found_columns: int
    """Outlier columns that its inputs had."""
    weights_db: float
    """What the SQNR would be if the weight alone were rounded, within ±MOST_DB like the next."""
    inputs_db: float
    """What it would be if the input alone were: for the rounding of all columns but those kept."""
    left_out: int
    """Outlier columns beyond the slots, which widen the scale of their rows."""


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    schemes: Mapping[str, QuantScheme],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    columns: Mapping[str, list[int]],
    announce: Callable[[str], None] = lambda fqn: None,
    statistics: Mapping[str, InputStatistics | None] | None = None,
) -> dict[str, LayerError]:
    """Runs the model once and quantizes each layer of `schemes` on the input that it gets.

    `columns` are calibrated outlier columns by layer, `statistics` what its scheme makes its weight with,
    where it needs any. A layer that did not run, or that is no module of this name, is left out. Errors of
    one layer do not reach the next: every layer sees the original model's values. `announce` is told each
    layer as it is done.
    """
    found: dict[str, LayerError] = {}

    def measure(fqn: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        quantized = MixqLinear.from_linear(
            module,
            schemes[fqn],
            columns=columns.get(fqn),
            keep_original=True,
            statistics=(statistics or {}).get(fqn),
        )
        found[fqn] = _error(quantized, x, output)
        announce(fqn)

    _run(model, schemes, args, kwargs, measure)
    return found


def _error(quantized: MixqLinear, x: Tensor, output: Tensor) -> LayerError:
    """The error of a layer, and its two parts: they add up to it, since rounding the input comes last."""
    exact, got = output.float(), quantized(x).float()
    rounded = nn.functional.linear(x.float(), _held_weight(quantized))
    if isinstance(quantized.bias, Tensor):
        rounded += quantized.bias.float()
    state = quantized.outlier_state()
    return LayerError(
        sqnr_db=_bounded(sqnr(exact, got)),
        found_columns=len(state.columns()),
        weights_db=_bounded(sqnr(exact, rounded)),
        inputs_db=_bounded(sqnr(exact, exact + (got - rounded))),
        left_out=state.overflow(),
    )


def _held_weight(quantized: MixqLinear) -> Tensor:
    """The fp32 weight `[N, K]` that a layer multiplies by, outlier columns as they are held."""
    weight = quantized.dequantized_weight()
    held = quantized.cached_index >= 0
    weight[:, quantized.cached_index[held].long()] = quantized.outlier_weight[:, held].float()
    return weight


@torch.no_grad()
def simulated_errors(
    model: nn.Module,
    sizes: Mapping[str, LinearSize],
    schemes: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    threshold: float,
) -> dict[str, dict[str, float]]:
    """SQNR in dB, within ±MOST_DB, of each linear in `sizes`, by scheme in SIMULATED and layer.

    The model runs once, in full precision. A layer that did not run, or that is no module of this name, is
    left out. Columns above `threshold` are outliers.
    """
    found: dict[str, dict[str, float]] = {scheme: {} for scheme in schemes}

    def measure(fqn: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        w = (weight if isinstance(module, nn.Linear) else weight.T).float()
        problem = Problem(x.reshape(-1, w.shape[1]).float(), w, sizes[fqn], threshold)
        exact = problem.x @ w.T
        for scheme in schemes:
            found[scheme][fqn] = _bounded(sqnr(exact, SIMULATED[scheme](problem)))

    _run(model, sizes, args, kwargs, measure)
    return found


def _run(
    model: nn.Module,
    fqns: Iterable[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    measure: Callable[[str, nn.Module, Tensor, Tensor], None],
) -> None:
    """Runs the model, and `measure` once for each of these layers, on the first input and output it has."""
    modules = dict(model.named_modules())
    seen: set[str] = set()
    handles = []
    try:
        for fqn in fqns:
            module = modules.get(fqn)
            if module is not None and isinstance(getattr(module, "weight", None), Tensor):

                def hook(module: nn.Module, inputs: Any, output: Any, fqn: str = fqn) -> None:
                    if fqn not in seen:
                        seen.add(fqn)
                        measure(fqn, module, inputs[0], output)

                handles.append(module.register_forward_hook(hook))
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _bounded(decibels: float) -> float:
    return -MOST_DB if math.isnan(decibels) else max(-MOST_DB, min(MOST_DB, decibels))
