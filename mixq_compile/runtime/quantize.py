"""`mixq.quantize`: swaps the linears of a model for MixqLinears, in place, and frees their weights."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import MixqError, OptionError, ReleasedWeightError
from mixq_compile.ir.linears import is_conv1d, is_plain_linear
from mixq_compile.ir.name_patterns import names_explicitly, no_match, unmatched
from mixq_compile.ir.roles import LM_HEAD, OTHER, role_of
from mixq_compile.ops import providers
from mixq_compile.runtime.compilation import LinearRecord, remember_swap, swapped_linears
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.saving_methods import take_over_saving
from mixq_compile.runtime.swap_obstacles import (
    holders_outside,
    is_uninitialized,
    obstacle,
    replace_in_containers,
    take_over,
)
from mixq_compile.runtime.weight_readers import weight_readers
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.scheme import QuantScheme
from mixq_compile.selection.columns import calibrated_columns
from mixq_compile.selection.eligibility import GROUPED, ineligible
from mixq_compile.selection.gain import LARGE_BATCH, no_kernel, not_faster
from mixq_compile.selection.scheme_rules import SchemeRules
from mixq_compile.selection.statistics import input_statistics

ALLOWED = ("batch_invariant", "capacity", "force", "ignore", "layers", "miss", "stats", "threshold")
"""The options of MixqOptions that a swap takes, beside the scheme."""
TIED = "its weight is tied to another module's"
NEVER_RAN = "it never ran during calibration: no batch reached it, or the model reads its weight"


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of a model by name, those that cannot be swapped too: `nn.Linear`s and `Conv1D`s."""
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def _is_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return is_conv1d(module)
    weight = getattr(module, "weight", None)
    return is_uninitialized(weight) or (isinstance(weight, Tensor) and weight.dim() == 2)


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
    rules = SchemeRules(options.scheme, options.layers, options.threshold, options.capacity, options.miss)
    linears = linears_of(model)
    bound = _bound_elsewhere(model, linears.values(), options)
    _warn_unmatched([*linears, *(name for name, _ in _expert_weights(model))], options)
    roles = _roles(model, linears)
    named = {name for name in linears if names_explicitly(name, [pattern for pattern, _ in options.layers])}
    schemes = {name: rules.scheme_for(name, role) for name, role in roles.items()}
    decided = {
        name: (
            scheme,
            _left_by_name(name, linears[name], roles[name], bound, options, name in named)
            or _why_not(name, linears[name], bound, options, scheme),
        )
        for name, scheme in schemes.items()
    }
    if options.stats is not None:
        options.stats.check_model(
            {name: _matrix(linears[name]).shape for name, (_, reason) in decided.items() if reason is None}
        )
    for name, (scheme, reason) in decided.items():
        weight = _matrix(linears[name])
        source = None
        if reason is None:
            swapped = _swap(model, name, scheme, options, keep_originals)
            source = swapped.outlier_weight_source
        yield LinearRecord(
            fqn=name,
            role=roles[name],
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            scheme=None if reason else scheme.name,
            kernel=None,
            skip=reason,
            outlier_weight_source=source,
            float_bytes=weight.nbytes,
        )
    for name, weight in _expert_weights(model):
        yield LinearRecord(
            fqn=name,
            role=OTHER,
            out_features=weight.shape[-2],
            in_features=weight.shape[-1],
            scheme=None,
            kernel=None,
            skip=GROUPED,
            outlier_weight_source=None,
            float_bytes=weight.nbytes,
        )


def _warn_unmatched(names: Collection[str], options: MixqOptions) -> None:
    given = {
        "ignore": [pattern for pattern in options.ignore if pattern not in MixqOptions.ignore],
        "layers": [pattern for pattern, _ in options.layers],
    }
    for option, patterns in given.items():
        for pattern in unmatched(patterns, names) if names else ():
            warnings.warn(no_match(option, pattern, names, "the model"), stacklevel=4)


def _matrix(module: nn.Module) -> Tensor:
    """The weight of a linear as [N, K]; empty where it has no shape yet."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if is_uninitialized(weight):
        return torch.empty(module.out_features, 0, dtype=weight.dtype, device="cpu")  # type: ignore[call-overload,no-any-return]
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def _expert_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of several experts in one parameter, which no linear module holds."""
    for name, module in model.named_modules():
        if "experts" in type(module).__name__.lower():
            for own, parameter in module.named_parameters(name, recurse=False):
                if parameter.dim() == 3:
                    yield own, parameter


def _bound_elsewhere(
    model: nn.Module, linears: Collection[nn.Module], options: MixqOptions
) -> dict[int, str]:
    """id of each linear that more than its own call needs in 16 bit, with the reason."""
    tied = _tied_weights(model)
    readers = weight_readers(model, linears)
    holders = holders_outside(model, linears)
    bound: dict[int, str] = {}
    for linear in linears:
        parameter = linear._parameters.get("weight")
        if parameter is not None and id(parameter) in tied:
            bound[id(linear)] = TIED
        elif id(linear) in readers:
            bound[id(linear)] = f"its weight is read by {readers[id(linear)]}"
        elif id(linear) in holders:
            bound[id(linear)] = f"{holders[id(linear)]} holds it too, where a swap does not reach it"
    return bound


def _roles(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """The role of each linear: by its name and size, and a head where the model says so itself.

    A model's own answer is `get_output_embeddings()`. Where it has none, its last linear is a head if it has
    a row for each entry of the largest embedding.
    """
    ask = getattr(model, "get_output_embeddings", None)
    heads = {id(ask())} if callable(ask) else set()
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    found = {}
    for name, module in linears.items():
        features = tuple(_matrix(module).shape)
        role = role_of(name, features)
        is_last = name == list(linears)[-1] and features[0] != features[1]
        by_size = is_last and role == OTHER and features[0] == max(tables, default=None)
        found[name] = LM_HEAD if id(module) in heads or by_size else role
    return found


def _left_by_name(
    name: str, module: nn.Module, role: str, bound: Mapping[int, str], options: MixqOptions, named: bool
) -> str | None:
    """Why a linear is left alone for its name, role, dtype or size; None where it is not."""
    weight = _matrix(module)
    if not weight.numel():
        return None
    # Who names a linear and a scheme for it means it, whatever its name says; that a head is tied says more.
    if named or bound.get(id(module)) == TIED:
        role = OTHER
    return ineligible(name, role, weight, () if named else options.ignore)


def _why_not(
    name: str, module: nn.Module, bound: Mapping[int, str], options: MixqOptions, scheme: QuantScheme
) -> str | None:
    """Why a linear is not swapped; None where it is."""
    weight = _matrix(module)
    reason = bound.get(id(module)) or obstacle(module)
    if reason is None and options.stats is not None and options.stats.never_ran(name):
        reason = NEVER_RAN
    if reason is None:
        out_features, in_features = weight.shape
        query = providers.linear_query(weight, out_features, in_features, scheme.weight, scheme.activation)
        reason = no_kernel(weight, out_features, in_features, scheme)
        reason = reason or (None if options.force else not_faster(query, [LARGE_BATCH]))
    return reason


def _tied_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _swap(
    model: nn.Module, name: str, scheme: QuantScheme, options: MixqOptions, keep_original: bool
) -> MixqLinear:
    """Puts a MixqLinear in a linear's place, under every name that it has; returns it."""
    linear = model.get_submodule(name)
    calibrated = None
    if options.stats is not None:
        calibrated = calibrated_columns(options.stats, name, scheme, _matrix(linear).shape[1])
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
