"""`mixq.report`: what was quantized and how, what was not and why, outliers found, memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.runtime.compilation import LinearRecord, compilations_of, swapped_linears
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.report_html import report_html
from mixq_compile.runtime.swap_record import swap_record
from mixq_compile.runtime.weight_store import STORE


@dataclass(frozen=True)
class LinearReport:
    """One linear: what it is, what became of it, and what its outlier state holds now."""

    fqn: str
    role: str
    out_features: int
    in_features: int
    scheme: str | None
    kernel: str | None
    skip: str | None
    outlier_source: str | None
    capacity: int
    outlier_columns: tuple[int, ...]
    overflow: int
    """How often a column found no slot."""
    bytes_before: int
    bytes_after: int
    """Bytes of codes, scales and outlier weights; `bytes_before` where the linear was left alone."""
    float_weight_kept: bool
    """True where the 16- or 32-bit weight is still in memory beside the codes."""
    kept_because: str | None = None
    """Why `release_weights` kept it; None where it was not asked to free it, or did."""


@dataclass(frozen=True)
class Report:
    """The linears of a model, in order; prints as a table."""

    linears: tuple[LinearReport, ...]
    graphs: int
    """Compiled graphs, recompilations included; 0 for a model that only had its modules swapped."""
    fallbacks: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[LinearReport, ...]:
        """The linears that run quantized."""
        return tuple(linear for linear in self.linears if linear.scheme is not None)

    @property
    def skipped(self) -> tuple[LinearReport, ...]:
        """The linears that were left alone."""
        return tuple(linear for linear in self.linears if linear.scheme is None)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about linears whose outliers did not fit."""
        return tuple(
            f"{linear.fqn}: columns were turned away {linear.overflow} times (capacity {linear.capacity}): "
            "raise capacity or threshold, or leave this linear in 16 bit with ignore."
            for linear in self.quantized
            if linear.overflow
        )

    @property
    def kept(self) -> tuple[str, ...]:
        """Which weights `release_weights` kept, and why."""
        return tuple(
            f"{linear.fqn}: release_weights kept its 16-bit weight: {linear.kept_because}."
            for linear in self.quantized
            if linear.kept_because
        )

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return asdict(self)

    def _lines(self) -> Iterator[str]:
        before = sum(linear.bytes_before for linear in self.quantized)
        after = sum(linear.bytes_after for linear in self.quantized)
        kept = sum(linear.bytes_before for linear in self.quantized if linear.float_weight_kept)
        yield f"{len(self.quantized)} of {len(self.linears)} linears quantized, {self.graphs} compiled graphs"
        if self.quantized:
            yield (
                f"their weights: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB packed"
                + (f", and {kept / 2**20:.1f} MiB of originals kept beside them" if kept else "")
            )
        width = max([len(linear.fqn) for linear in self.linears] + [6])
        yield ""
        yield f"{'linear':{width}}  {'N x K':>13}  {'scheme':8}  {'kernel':6}  outliers  overflow"
        for linear in self.linears:
            shape = f"{linear.out_features} x {linear.in_features}"
            if linear.scheme is None:
                yield f"{linear.fqn:{width}}  {shape:>13}  left alone: {linear.skip}"
                continue
            outliers = f"{len(linear.outlier_columns)}/{linear.capacity}"
            yield (
                f"{linear.fqn:{width}}  {shape:>13}  {linear.scheme:8}  {linear.kernel or 'auto':6}  "
                f"{outliers:>8}  {linear.overflow:>8}"
            )
        for fallback in self.fallbacks:
            yield f"a graph was compiled unquantized: {fallback}"
        yield from self.kept
        for advice in self.advice:
            yield f"advice: {advice}"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return report_html(self)


def _from_record(record: LinearRecord) -> LinearReport:
    weight = record.weight() if record.weight is not None else None
    state: OutlierState | None = record.state() if record.state is not None else None
    packed_bytes = STORE.packed_bytes(weight) if weight is not None else 0
    quantized = record.scheme is not None and packed_bytes > 0
    return LinearReport(
        fqn=record.fqn,
        role=record.role,
        out_features=record.out_features,
        in_features=record.in_features,
        scheme=record.scheme,
        kernel=record.kernel,
        skip=record.skip,
        outlier_source=record.outlier_source,
        capacity=state.capacity if state is not None else 0,
        outlier_columns=tuple(state.columns()) if state is not None else (),
        overflow=state.overflow() if state is not None else 0,
        bytes_before=record.float_bytes,
        bytes_after=packed_bytes if quantized else record.float_bytes,
        float_weight_kept=quantized and weight is not None and not STORE.is_released(weight),
        kept_because=STORE.kept_because(weight) if quantized and weight is not None else None,
    )


def _from_module(record: LinearRecord, module: MixqLinear) -> LinearReport:
    state = module.outlier_state()
    return LinearReport(
        fqn=record.fqn,
        role=record.role,
        out_features=record.out_features,
        in_features=record.in_features,
        scheme=module.scheme.name,
        kernel=record.kernel,
        skip=None,
        outlier_source=module.outlier_weight_source,
        capacity=state.capacity,
        outlier_columns=tuple(state.columns()),
        overflow=state.overflow(),
        bytes_before=record.float_bytes,
        bytes_after=module.nbytes,
        float_weight_kept=module.outlier_source.numel() > 0,
    )


def report(model: nn.Module) -> Report:
    """What mixq did to a model: one compiled with `backend="mixq"`, or one that `quantize` swapped.

    Reads the outlier states from the device. Warns where nothing was quantized, or where a compiled
    model has not run yet (the backend works at the first call).
    """
    inner: nn.Module = getattr(model, "_orig_mod", model)
    compilations = compilations_of([*inner.parameters(), *inner.buffers()])
    owned = {id(parameter) for parameter in inner.parameters()}
    rows: dict[str, LinearReport] = {}
    for record in swapped_linears(inner):
        module = inner.get_submodule(record.fqn) if record.scheme is not None else None
        rows[record.fqn] = (
            _from_module(record, module) if isinstance(module, MixqLinear) else _from_record(record)
        )
    for name, module in inner.named_modules():
        # A copy of a swapped model, or one that was unpickled.
        if isinstance(module, MixqLinear) and name not in rows:
            rows[name] = _from_module(swap_record(name, module), module)
    for compilation in compilations:
        for record in compilation.linears:
            weight = record.weight() if record.weight is not None else None
            known = rows.get(record.fqn)
            computed = record.weight is None
            if not computed and id(weight) not in owned:
                continue
            if known is None or known.scheme is None or record.scheme is not None:
                rows[record.fqn] = _from_record(record)
    made = Report(
        linears=tuple(rows.values()),
        graphs=len(compilations),
        fallbacks=tuple(compilation.fallback for compilation in compilations if compilation.fallback),
    )
    if not rows:
        warnings.warn(
            "mixq has seen no linear of this model: run a model compiled with backend='mixq' once first, or "
            "swap its linears with mixq_compile.quantize(model).",
            stacklevel=2,
        )
    elif not made.quantized:
        warnings.warn("none of this model's linears is quantized: the report says why.", stacklevel=2)
    return made


def _states(model: nn.Module) -> list[OutlierState]:
    inner: nn.Module = getattr(model, "_orig_mod", model)
    modules = [module.outlier_state() for module in inner.modules() if isinstance(module, MixqLinear)]
    return [*modules, *STORE.states(inner.parameters())]


def reset(model: nn.Module) -> None:
    """Forgets the outlier columns found online, as after loading; calibrated columns stay."""
    for state in _states(model):
        state.reset()


def freeze(model: nn.Module) -> None:
    """Keeps each outlier column known now and learns no more: results stop depending on traffic."""
    for state in _states(model):
        state.freeze()
