"""`mixq.quantize`: swaps the linears of a model for MixqLinears, in place, and frees their weights."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from mixq_compile.errors import MixqError, OptionError
from mixq_compile.ir.roles import role_of
from mixq_compile.ops import providers
from mixq_compile.passes.select_scheme import SMALLEST_FEATURES, name_matches
from mixq_compile.runtime.compilation import LinearRecord, remember_swap
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.scheme import QuantScheme, get_scheme

log = logging.getLogger(__name__)


def is_conv1d(module: nn.Module) -> bool:
    """True for the Conv1D of transformers: a linear whose weight is [K, N]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers")


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linears that can be swapped, by name: exact `nn.Linear` and `Conv1D`, no subclasses."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear or is_conv1d(module)
    }


def _scheme_for(fqn: str, role: str, options: MixqOptions) -> QuantScheme:
    name = next((scheme for pattern, scheme in options.layers if name_matches(fqn, pattern)), options.scheme)
    scheme = get_scheme(name)
    if role in scheme.eight_bit_roles:
        scheme = get_scheme("w8a8o16")
    changes = {"threshold": options.threshold, "capacity": options.capacity, "miss": options.miss}
    return scheme.with_outliers(**{key: value for key, value in changes.items() if value is not None})


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _why_not(fqn: str, module: nn.Module, role: str, tied: set[int], options: MixqOptions) -> str | None:
    pattern = next((entry for entry in options.ignore if name_matches(fqn, entry)), None)
    if pattern is not None:
        return f"ignored: its name matches {pattern!r}"
    if role == "lm_head":
        return "the output head stays in 16 or 32 bit"
    if role == "router":
        return "a router: its choice of experts must not change"
    if id(module.weight) in tied:
        return "its weight is tied to another module's"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}, not a floating-point type that has kernels"
    if min(module.weight.shape) < SMALLEST_FEATURES:
        return f"too small: {tuple(module.weight.shape)}, and an integer product needs {SMALLEST_FEATURES} of each"
    return None


def _tied_weights(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _slower(module: nn.Module, scheme: QuantScheme, options: MixqOptions) -> str | None:
    """Why a linear would not gain, measured at 256 rows; None where it would, or nothing is known."""
    out_features, in_features = _shape(module)
    op = "mixed_linear" if scheme.activation else "weight_only_linear"
    weight = module.weight
    query = providers.KernelQuery(
        op, weight.device, weight.dtype, scheme.weight.bits, in_features, out_features
    )
    chosen, refused = providers.rejections(query)
    if chosen is None or chosen.name == "ref":
        return "no fast kernel: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
    ratio = chosen.speedup(query, 256) if chosen.speedup else None
    if ratio is not None and ratio < 1.0:
        return f"not faster with {chosen.name}: {ratio:.2f}x at 256 rows"
    return None


def quantize(
    model: nn.Module, scheme: str = "w8a8o16", *, keep_originals: bool = False, **options: Any
) -> nn.Module:
    """Swaps the linears of a model for MixqLinears in place; returns the model.

    Args:
        model: any module; its exact `nn.Linear`s and transformers' `Conv1D`s are looked at.
        scheme: name of the scheme.
        keep_originals: keep each 16-bit weight as the source of outlier columns found online.
        options: the other fields of MixqOptions: stats, threshold, capacity, miss, ignore, layers,
            batch_invariant, and force (default True here: a swap is for memory as much as for time).

    Raises OptionError for wrong options, StatisticsError for statistics of another model; warns
    where nothing was swapped.
    """
    allowed = {"stats", "threshold", "capacity", "miss", "ignore", "layers", "batch_invariant", "force"}
    if wrong := set(options) - allowed:
        raise OptionError(
            f"quantize takes no option {sorted(wrong)[0]!r}. Valid: {', '.join(sorted(allowed))}."
        )
    chosen = MixqOptions.from_user(options={"scheme": scheme, "force": True, **options})
    linears = linears_of(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MixqError("the model is on the meta device and has no weights to quantize: load them first.")
    stats = chosen.stats
    if stats is not None:
        stats.check_model({name: _shape(module)[1] for name, module in linears.items()})
    tied = _tied_weights(model)
    records = []
    for fqn, module in linears.items():
        role = role_of(fqn)
        layer_scheme = _scheme_for(fqn, role, chosen)
        reason = _why_not(fqn, module, role, tied, chosen)
        if reason is None and not chosen.force:
            reason = _slower(module, layer_scheme, chosen)
        out_features, in_features = _shape(module)
        records.append(
            LinearRecord(
                fqn=fqn, role=role, out_features=out_features, in_features=in_features,
                scheme=None if reason else layer_scheme.name, kernel=None, skip=reason,
                outlier_source=None if reason else "original" if keep_originals else "codes",
                float_bytes=module.weight.nbytes,
            )
        )  # fmt: skip
        if reason is None:
            _swap(model, fqn, module, layer_scheme, chosen, keep_originals)
    remember_swap(model, records)
    if not linears:
        warnings.warn("the model has no linears: nothing to quantize.", stacklevel=2)
    elif all(record.scheme is None for record in records):
        reasons = "; ".join(sorted({record.skip or "" for record in records}))
        warnings.warn(f"mixq quantized none of the {len(records)} linears: {reasons}.", stacklevel=2)
    return model


def _swap(
    model: nn.Module,
    fqn: str,
    module: nn.Module,
    scheme: QuantScheme,
    options: MixqOptions,
    keep_original: bool,
) -> None:
    columns = maxima = None
    statistics = options.stats.find(fqn) if options.stats is not None else None
    if statistics is not None and options.stats is not None and scheme.outliers is not None:
        four_bit = scheme.activation is not None and scheme.activation.bits == 4
        columns = options.stats.outlier_columns(
            fqn,
            threshold=None if four_bit else scheme.outliers.threshold,
            count=scheme.outliers.capacity_for(_shape(module)[1]),
        )
        maxima = [float(statistics.absmax[column]) for column in columns]
    swapped = MixqLinear.from_linear(
        module, scheme, columns=columns, column_max=maxima,
        batch_invariant=options.batch_invariant, keep_original=keep_original,
    )  # fmt: skip
    swapped.train(module.training)
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, swapped)
