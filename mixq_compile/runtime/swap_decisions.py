"""What `mixq.quantize` does with each linear of a model, decided before any is touched."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixq_compile.ir.linears import is_conv1d
from mixq_compile.ir.name_patterns import names_explicitly, no_match, unmatched
from mixq_compile.ir.roles import LM_HEAD, OTHER, role_of
from mixq_compile.ops import providers
from mixq_compile.runtime.compilation import LinearRecord
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.swap_obstacles import holders_outside, is_uninitialized, obstacle
from mixq_compile.runtime.weight_readers import weight_readers
from mixq_compile.scheme import QuantScheme
from mixq_compile.selection.eligibility import GROUPED, ineligible
from mixq_compile.selection.gain import LARGE_BATCH, no_kernel, not_faster
from mixq_compile.selection.scheme_rules import SchemeRules
from mixq_compile.selection.statistics import never_ran

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


@dataclass(frozen=True)
class Decision:
    """What becomes of one linear of a model."""

    fqn: str
    role: str
    scheme: QuantScheme
    skip: str | None
    """Why it stays as it is; None where it is quantized."""
    shape: tuple[int, int]
    """N and K."""
    float_bytes: int
    """Bytes of its weight now."""
    transposed: bool
    """True for a `Conv1D`, whose weight is [K, N]."""


def record_of(decision: Decision, outlier_weight_source: str | None = None) -> LinearRecord:
    """What reports say of a linear of which this was decided."""
    return LinearRecord(
        fqn=decision.fqn,
        role=decision.role,
        out_features=decision.shape[0],
        in_features=decision.shape[1],
        scheme=None if decision.skip else decision.scheme.name,
        kernel=None,
        skip=decision.skip,
        outlier_weight_source=outlier_weight_source,
        float_bytes=decision.float_bytes,
    )


def decide(model: nn.Module, options: MixqOptions, device: torch.device | None = None) -> list[Decision]:
    """What is quantized, and in which scheme; nothing is changed. Weights may be on the meta device.

    `device` is where the model will run, where its weights are not there yet. Raises StatisticsError for
    statistics of another model.
    """
    rules = SchemeRules(options.scheme, options.layers, options.threshold, options.capacity, options.miss)
    linears = linears_of(model)
    bound = _bound_elsewhere(model, linears.values(), options)
    _warn_unmatched([*linears, *(name for name, _ in _expert_weights(model))], options)
    roles = _roles(model, linears)
    named = {name for name in linears if names_explicitly(name, [pattern for pattern, _ in options.layers])}
    schemes = {name: rules.scheme_for(name, role) for name, role in roles.items()}
    reasons = {
        name: _left_by_name(name, linears[name], roles[name], bound, options, name in named)
        or _why_not(name, linears[name], bound, options, scheme, device)
        for name, scheme in schemes.items()
    }
    if options.stats is not None:
        options.stats.check_model(
            {name: weight_matrix(linears[name]).shape for name, reason in reasons.items() if reason is None}
        )
    found = []
    for name, linear in linears.items():
        weight = weight_matrix(linear)
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        transposed = is_conv1d(linear)
        found.append(
            Decision(name, roles[name], schemes[name], reasons[name], shape, weight.nbytes, transposed)
        )
    return found


def records_of_experts(model: nn.Module) -> Iterator[LinearRecord]:
    """Records of the weights of several experts in one parameter, which are left alone."""
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


def weight_matrix(module: nn.Module) -> Tensor:
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
        features = tuple(weight_matrix(module).shape)
        role = role_of(name, features)
        is_last = name == list(linears)[-1] and features[0] != features[1]
        by_size = is_last and role == OTHER and features[0] == max(tables, default=None)
        found[name] = LM_HEAD if id(module) in heads or by_size else role
    return found


def _left_by_name(
    name: str, module: nn.Module, role: str, bound: Mapping[int, str], options: MixqOptions, named: bool
) -> str | None:
    """Why a linear is left alone for its name, role, dtype or size; None where it is not."""
    weight = weight_matrix(module)
    if not weight.numel():
        return None
    # Who names a linear and a scheme for it means it, whatever its name says; that a head is tied says more.
    if named or bound.get(id(module)) == TIED:
        role = OTHER
    return ineligible(name, role, weight, () if named else options.ignore)


def _why_not(
    name: str,
    module: nn.Module,
    bound: Mapping[int, str],
    options: MixqOptions,
    scheme: QuantScheme,
    device: torch.device | None,
) -> str | None:
    """Why a linear is not swapped; None where it is."""
    weight = weight_matrix(module)
    reason = bound.get(id(module)) or obstacle(module)
    if reason is None and options.stats is not None and options.stats.never_ran(name):
        reason = NEVER_RAN
    reason = reason or never_ran(options.stats, name, scheme)
    if reason is None:
        out_features, in_features = weight.shape
        like = weight if device is None else torch.empty(0, dtype=weight.dtype, device=device)
        query = providers.linear_query(like, out_features, in_features, scheme.weight, scheme.activation)
        reason = no_kernel(like, out_features, in_features, scheme)
        reason = reason or (None if options.force else not_faster(query, [LARGE_BATCH]))
    return reason


def _tied_weights(model: nn.Module) -> set[int]:
    """ids of the parameters that more than one module holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    # A model that transformers is about to load is not tied yet.
    names: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name in (*names.keys(), *names.values()):
        owner, _, leaf = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            tied.add(id(getattr(model.get_submodule(owner), leaf)))
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied
