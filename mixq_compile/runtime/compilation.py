"""What the backend did, kept for reports: one `Compilation` for each graph, found by its parameters."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.pipeline import History
from mixq_compile.runtime.options import MixqOptions

_numbers = itertools.count()


@dataclass(frozen=True)
class LinearRecord:
    """What became of one linear of one graph."""

    fqn: str
    role: str
    out_features: int
    in_features: int
    scheme: str | None
    """None where the linear stays as it was."""
    kernel: str | None
    skip: str | None
    """Why it stays as it was."""
    outlier_weight_source: str | None
    """Where the weights of outlier columns come from: `original` or `codes`."""
    float_bytes: int
    """Bytes of the 16- or 32-bit weight."""
    weight: weakref.ref[Tensor] | None = field(repr=False, compare=False, default=None)
    state: weakref.ref[OutlierState] | None = field(repr=False, compare=False, default=None)


@dataclass(frozen=True)
class Compilation:
    """One graph that the backend compiled."""

    number: int
    options: MixqOptions
    history: History | None
    """None where a pass failed and the graph was compiled unquantized."""
    linears: tuple[LinearRecord, ...]
    parameters: tuple[weakref.ref[Tensor], ...] = field(repr=False, compare=False)
    """Every parameter and buffer that the graph reads."""
    fallback: str | None = None
    """The error that made the backend compile the graph unquantized; None usually."""


_COMPILATIONS: list[Compilation] = []
_MOST_KEPT = 256
"""Older compilations are forgotten: a server that recompiles for ever must not grow."""


def record(
    options: MixqOptions,
    history: History | None,
    linears: Iterable[LinearRecord],
    parameters: Iterable[Tensor],
    fallback: str | None = None,
) -> Compilation:
    """Keeps one compilation for later reports."""
    references = tuple(weakref.ref(parameter) for parameter in parameters)
    made = Compilation(next(_numbers), options, history, tuple(linears), references, fallback)
    _COMPILATIONS.append(made)
    del _COMPILATIONS[:-_MOST_KEPT]
    return made


def compilations_of(tensors: Iterable[Tensor]) -> list[Compilation]:
    """The compilations that read one of these parameters or buffers, oldest first."""
    wanted = {id(tensor) for tensor in tensors}

    def reads(compilation: Compilation) -> bool:
        alive = (reference() for reference in compilation.parameters)
        return any(tensor is not None and id(tensor) in wanted for tensor in alive)

    return [compilation for compilation in _COMPILATIONS if reads(compilation)]


_SWAP = "_mixq_linears"
"""The attribute of a model that keeps what `quantize` did; copies and pickles of the model have it too."""


def remember_swap(model: nn.Module, linears: Iterable[LinearRecord]) -> None:
    """Keeps what `quantize` did to each linear of a model, with the model."""
    vars(model)[_SWAP] = tuple(linears)


def swapped_linears(model: nn.Module) -> tuple[LinearRecord, ...]:
    """What `quantize` did to each linear of a model or of its parts; empty where it was not used."""
    found: dict[str, LinearRecord] = {}
    for name, module in model.named_modules():
        for linear in vars(module).get(_SWAP, ()):
            fqn = f"{name}.{linear.fqn}" if name else linear.fqn
            found.setdefault(fqn, linear if not name else replace(linear, fqn=fqn))
    return tuple(found.values())


_CALIBRATIONS: weakref.WeakKeyDictionary[nn.Module, Mapping[str, Any]] = weakref.WeakKeyDictionary()


def remember_calibration(model: nn.Module, facts: Mapping[str, Any] | None) -> None:
    """Keeps what a model was calibrated with, for as long as the model lives."""
    if facts:
        _CALIBRATIONS[model] = dict(facts)


def calibration_of(model: nn.Module) -> Mapping[str, Any] | None:
    """What a model was calibrated with; None where it was not, or nothing is known."""
    return _CALIBRATIONS.get(model)
