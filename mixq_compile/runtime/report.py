"""`mixq.report`: what was quantized and how, what was not and why, outliers found, memory."""

from __future__ import annotations

import warnings

from torch import nn

from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.runtime.compilation import LinearRecord, compilations_of, swapped_linears
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.report_tables import LinearReport, Report
from mixq_compile.runtime.swap_record import swap_record
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.runtime.weight_watch import calls_until_seen


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
        outlier_weight_source=record.outlier_weight_source,
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
        outlier_weight_source=module.outlier_weight_source,
        capacity=state.capacity,
        outlier_columns=tuple(state.columns()),
        overflow=state.overflow(),
        bytes_before=record.float_bytes,
        bytes_after=module.nbytes,
        float_weight_kept=module.outlier_source.numel() > 0,
    )


def _why_empty(model: nn.Module, inner: nn.Module) -> str:
    """Why nothing was seen of a model, and what to do."""
    todo = (
        "run a model compiled with backend='mixq' once first, or swap its linears with "
        "mixq_compile.quantize(model)."
    )
    if model is not inner and hasattr(inner, "generate"):
        return (
            "mixq has seen no linear of this model: nothing called it. Its generate() is that of the "
            "uncompiled model, which runs without mixq: mixq_compile.prepare_for_generation(model, "
            f"backend='mixq') compiles what generate() runs. Else {todo}"
        )
    other = " Only calls of the compiled model itself are compiled, not its other methods." * (
        model is not inner
    )
    return f"mixq has seen no linear of this model: {todo}{other}"


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
        calls_until_seen=calls_until_seen(list(inner.parameters())),
        fallbacks=tuple(compilation.fallback for compilation in compilations if compilation.fallback),
    )
    if not rows:
        warnings.warn(_why_empty(model, inner), stacklevel=2)
    elif not made.quantized:
        warnings.warn("none of this model's linears is quantized: the report says why.", stacklevel=2)
    return made
