"""`mixq.quantize`: swaps the linears of a model for MixqLinears, in place, and frees their weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from mixq_compile.calibration.statistics import CalibrationStats
from mixq_compile.errors import MixqError, OptionError, ReleasedWeightError
from mixq_compile.ir.linears import is_conv1d, is_plain_linear
from mixq_compile.runtime.compilation import (
    LinearRecord,
    remember_calibration,
    remember_swap,
    swapped_linears,
)
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.saving_methods import take_over_saving
from mixq_compile.runtime.swap_decisions import decide, record_of, records_of_experts, weight_matrix
from mixq_compile.runtime.swap_obstacles import replace_in_containers, take_over
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.scheme import QuantScheme
from mixq_compile.schemes.registry import get_scheme
from mixq_compile.selection.columns import calibrated_columns
from mixq_compile.selection.statistics import input_statistics
from mixq_compile.weights.recipe import outliers_from_codes

ALLOWED = ("batch_invariant", "capacity", "force", "ignore", "layers", "miss", "stats", "threshold")
"""The options of MixqOptions that a swap takes, beside the scheme."""


def calibration_facts(stats: CalibrationStats) -> dict[str, Any]:
    """What a directory says of the statistics that its model was quantized with."""
    return {
        "statistics_sha256": stats.sha256(),
        "rows": stats.total_rows,
        "model_class": stats.model_class,
        "package_version": stats.package_version,
    }


def quantize(
    model: nn.Module, scheme: str = "w8a8o16", *, keep_originals: bool = False, **options: Any
) -> nn.Module:
    """Swaps the linears of a model for MixqLinears in place; returns the model.

    Args:
        model: any module; its `nn.Linear`s and transformers' `Conv1D`s are looked at. Left alone, with the
            reason in the report, are those whose weight is computed or read by other code, subclasses,
            and those with parts, state-dict hooks or a forward of their own. Forward hooks and other
            attributes set on a linear are kept.
        scheme: name of the scheme.
        keep_originals: keep each 16-bit weight as the source of outlier columns found online.
        options: the other fields of MixqOptions: stats, threshold, capacity, miss, ignore, layers,
            batch_invariant, and force (default True here: a swap is for memory as much as for time).

    Raises OptionError for wrong options, StatisticsError for statistics of another model; warns
    where nothing was swapped.
    """
    for name in options:
        if name not in ALLOWED:
            raise OptionError(f"quantize takes no option {name!r}. Valid: {', '.join(ALLOWED)}.")
    chosen = MixqOptions.from_user(options={"scheme": scheme, "force": True, **options})
    chosen.warn_of_missing_statistics(stacklevel=2)
    if not keep_originals:
        chosen.check_codes_only("quantize without keep_originals frees")
    elif outliers_from_codes(get_scheme(chosen.scheme).recipe):
        raise OptionError(
            f"scheme {chosen.scheme!r} takes outlier columns from its codes, which make up for each other's "
            "errors: leave keep_originals out."
        )
    if is_plain_linear(model) or is_conv1d(model):
        raise MixqError(
            "the model is a single linear and cannot be swapped in place: wrap it in nn.Sequential."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MixqError("the model is on the meta device and has no weights to quantize: load them first.")
    if any(STORE.is_released(parameter) for parameter in model.parameters()):
        raise ReleasedWeightError(
            "the model's weights were freed by options={'release_weights': True} and cannot be quantized "
            "again: load the model again."
        )
    records = list(_swap_all(model, chosen, keep_originals))
    if chosen.stats is not None:
        remember_calibration(model, calibration_facts(chosen.stats))
    before = [record for record in swapped_linears(model) if record.scheme is not None]
    remember_swap(model, [*before, *records])
    take_over_saving(model)
    if not records:
        warnings.warn("the model has no linears: nothing to quantize.", stacklevel=2)
    elif all(record.scheme is None for record in records):
        reasons = "; ".join(sorted({record.skip or "" for record in records}))
        warnings.warn(f"mixq quantized none of the {len(records)} linears: {reasons}.", stacklevel=2)
    return model


def _swap_all(model: nn.Module, options: MixqOptions, keep_originals: bool) -> Iterator[LinearRecord]:
    """Decides about each linear, swaps those that are quantized, and records all."""
    for decision in decide(model, options):
        source = None
        if decision.skip is None:
            swapped = swap_linear(model, decision.fqn, decision.scheme, options, keep_originals)
            source = swapped.outlier_weight_source
        yield record_of(decision, source)
    yield from records_of_experts(model)


def swap_linear(
    model: nn.Module, name: str, scheme: QuantScheme, options: MixqOptions, keep_original: bool
) -> MixqLinear:
    """Puts a MixqLinear in a linear's place, under every name that it has; returns it."""
    linear = model.get_submodule(name)
    calibrated = None
    if options.stats is not None:
        calibrated = calibrated_columns(options.stats, name, scheme, weight_matrix(linear).shape[1])
    columns, maxima = calibrated if calibrated is not None else (None, None)
    swapped = MixqLinear.from_linear(
        linear,
        scheme,
        columns=columns,
        column_max=maxima,
        batch_invariant=options.batch_invariant,
        keep_original=keep_original,
        statistics=input_statistics(options.stats, name, scheme),
    )
    swapped.train(linear.training)
    swapped.fqn = name
    take_over(swapped, linear)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is linear:
                parent._modules[child] = swapped
    replace_in_containers(model, linear, swapped)
    return swapped
