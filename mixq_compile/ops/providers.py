"""Who implements an operator: providers register here, one is chosen for each call.

A provider is a folder in `mixq_compile/kernels/`; each of its modules registers functions with
`@provider(...)`. The reference (`ref`) implements everything and is the specification.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixq_compile.errors import KernelError, unknown_name
from mixq_compile.formats import INT4, INT8, TensorFormat
from mixq_compile.ops.activation_codes import code_bits

log = logging.getLogger(__name__)

AUTO = "auto"
ADDED_BEHIND = frozenset({"addend"})
"""Operands that `run_with` adds to the result of a kernel that has no place for them."""
ANY_WEIGHT = ANY_ACTIVATION = str(INT8)
"""What `run` is told where an operator takes no codes of that kind, or where their format is all one."""
_KERNELS_FOLDER = Path(__file__).parent.parent / "kernels"
_KERNELS = f"{__name__.split('.', maxsplit=1)[0]}.{_KERNELS_FOLDER.name}"
"""Where providers lie; they are found by being there, whichever there are."""


@dataclass(frozen=True)
class KernelQuery:
    """What a provider must know to say whether it supports a call; nothing here depends on M."""

    op: str
    device: torch.device
    dtype: torch.dtype
    """dtype of the activation: bfloat16, float16 or float32."""
    weight: TensorFormat = INT8
    """Format of the weight's codes."""
    activation: TensorFormat | None = INT8
    """Format of the activation's codes; None where it stays in 16 bit."""
    in_features: int | None = None
    out_features: int | None = None
    operands: frozenset[str] = frozenset()
    """Operands that the call gives although they have a default: a kernel need not have a place for them."""


Supports = Callable[[KernelQuery], "bool | str"]
"""True, or the reason why not."""
Speedup = Callable[[KernelQuery, int], "float | None"]
"""Time of the 16/32-bit linear over the provider's whole path at this M; None where not known."""


@dataclass(frozen=True)
class Provider:
    """One implementation of one operator."""

    op: str
    name: str
    function: Callable[..., Any]
    supports: Supports
    priority: int
    speedup: Speedup | None = None
    small_batch: Callable[[KernelQuery], int] | None = None
    """Largest M that the weight-only path serves better; None means that path is never better."""
    merges: Supports | None = None
    """Whether one product with the rows of several weights beats a product for each; None: not known to."""
    takes: frozenset[str] = frozenset()
    """The operands with a default that its function has a place for."""

    def verdict(self, query: KernelQuery) -> bool | str:
        """True, or why it does not serve a call: `supports` says it, or an operand has no place."""
        if lacking := sorted(query.operands - self.takes - ADDED_BEHIND):
            return f"it has no place for {', '.join(lacking)}"
        return self.supports(query)


_PROVIDERS: dict[str, dict[str, Provider]] = {}
_SIGNATURES: dict[str, tuple[str, ...]] = {}
"""By operator: the operands that every provider takes."""
_OPTIONAL: dict[str, tuple[str, ...]] = {}
"""By operator: the operands with a default, which a provider may lack."""
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_AFTER_CHANGES: list[Callable[[], None]] = []
_AFTER_LOADING: list[Callable[[], object]] = []
announced: set[tuple[str, str]] = set()
"""Operators and devices of which it has been said that they run the slow reference."""


def declare(op: str, function: Callable[..., Any]) -> None:
    """Records an operator's argument names (without `kernel`, the last that has no default), for providers
    to match."""
    parameters = inspect.signature(function).parameters
    optional = tuple(name for name, given in parameters.items() if given.default is not given.empty)
    _SIGNATURES[op] = tuple(name for name in parameters if name not in (*optional, "kernel"))
    _OPTIONAL[op] = optional


def implements(op: str, function: Callable[..., Any]) -> None:
    """Records the Python function of an operator: it checks, chooses providers and calls them."""
    _IMPLEMENTATIONS[op] = function


def implementations() -> Mapping[str, Callable[..., Any]]:
    """The Python functions of all operators, composite ones too."""
    return _IMPLEMENTATIONS


def after_loading(ready: Callable[[], object]) -> None:
    """Calls this once all providers are loaded: for one that then takes over operators of its own."""
    _AFTER_LOADING.append(ready)


def on_change(forget: Callable[[], None]) -> None:
    """Calls this whenever a provider is registered: what was remembered of a choice may be wrong then."""
    _AFTER_CHANGES.append(forget)


def provider(
    op: str,
    *,
    name: str,
    priority: int,
    supports: Supports,
    speedup: Speedup | None = None,
    small_batch: Callable[[KernelQuery], int] | None = None,
    merges: Supports | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated function as provider `name` of operator `op`.

    Raises KernelError where its argument names differ from the operator's. It may lack operands that have a
    default: calls that give them take another provider.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if op not in _SIGNATURES:
            raise unknown_name("operator", op, _SIGNATURES)
        found = tuple(inspect.signature(function).parameters)
        takes = tuple(operand for operand in _OPTIONAL[op] if operand in found)
        if found != (*_SIGNATURES[op], *takes):
            may = f", and may have {_OPTIONAL[op]}" if _OPTIONAL[op] else ""
            raise KernelError(
                f"provider {name!r} of mixq::{op} takes {found}, but the operator has "
                f"{_SIGNATURES[op]}{may}: give it the same arguments in the same order."
            )
        _PROVIDERS.setdefault(op, {})[name] = Provider(
            op, name, function, supports, priority, speedup, small_batch, merges, frozenset(takes)
        )
        for forget in (choose.cache_clear, _chosen.cache_clear, _chosen_with.cache_clear, *_AFTER_CHANGES):
            forget()
        return function

    return register


@functools.cache
def load_providers() -> tuple[str, ...]:
    """Imports every module of every folder in `mixq_compile/kernels` once; returns the folders' names."""
    for name in provider_names():
        package = importlib.import_module(f"{_KERNELS}.{name}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for ready in _AFTER_LOADING:
        ready()
    return provider_names()


def providers_of(op: str) -> list[Provider]:
    """All providers of an operator, the preferred one first."""
    load_providers()
    return sorted(_PROVIDERS.get(op, {}).values(), key=lambda entry: -entry.priority)


def operators() -> tuple[str, ...]:
    """Names of all declared operators that providers implement."""
    return tuple(sorted(_SIGNATURES))


def rejections(query: KernelQuery) -> tuple[Provider | None, dict[str, str]]:
    """The preferred provider that supports the query, and for each refused one its reason."""
    refused: dict[str, str] = {}
    for entry in providers_of(query.op):
        verdict = entry.verdict(query)
        if verdict is True:
            return entry, refused
        refused[entry.name] = str(verdict)
    return None, refused


@functools.lru_cache(maxsize=4096)
def choose(query: KernelQuery) -> Provider:
    """The preferred provider that supports the query. Raises KernelError with all reasons."""
    chosen, refused = rejections(query)
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise KernelError(f"no kernel for mixq::{query.op} on {query.device}: {reasons}.")
    place = (query.op, query.device.type)
    if refused and chosen.name == "ref" and place not in announced:
        announced.add(place)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        log.warning("mixq::%s on %s runs the slow reference (%s)", query.op, query.device, reasons)
    return chosen


def named(op: str, name: str) -> Provider:
    """Provider `name` of operator `op`. Raises OptionError that lists the valid names."""
    load_providers()
    found = _PROVIDERS.get(op, {}).get(name)
    if found is None:
        raise unknown_name(f"kernel provider of mixq::{op}", name, _PROVIDERS.get(op, {}))
    return found


@functools.lru_cache(maxsize=4096)
def _chosen(
    op: str, device: torch.device, dtype: torch.dtype, weight: str, activation: str
) -> Callable[..., Any]:
    """The function that `choose` chooses; in every call, where a query costs microseconds to hash."""
    code_bits(activation)
    query = KernelQuery(op, device, dtype, TensorFormat.parse(weight), TensorFormat.parse(activation))
    return choose(query).function


def run(op: str, kernel: str, x: torch.Tensor, weight: str, activation: str, *arguments: Any) -> Any:
    """Calls the chosen provider (`kernel` is its name or `"auto"`) with the operator's arguments.

    `x` is a tensor whose device and dtype decide under `"auto"`, and with them `weight` and `activation`, the
    texts of the formats of the codes that are read and written.
    """
    if kernel == AUTO:
        return _chosen(op, x.device, x.dtype, weight, activation)(*arguments)
    code_bits(activation)
    return named(op, kernel).function(*arguments)


@functools.lru_cache(maxsize=4096)
def _chosen_with(
    op: str, kernel: str, device: torch.device, dtype: torch.dtype, weight: str, activation: str,
    given: frozenset[str],
) -> Provider:  # fmt: skip
    """The provider of a call that gives operands which have a default."""
    code_bits(activation)
    formats = TensorFormat.parse(weight), TensorFormat.parse(activation)
    query = KernelQuery(op, device, dtype, *formats, operands=given)
    if kernel == AUTO:
        return choose(query)
    found = named(op, kernel)
    if lacking := sorted(given - found.takes - ADDED_BEHIND):
        raise KernelError(f"kernel {kernel!r} of mixq::{op} has no place for {', '.join(lacking)}.")
    return found


def run_with(
    optional: Mapping[str, Any],
    op: str,
    kernel: str,
    x: torch.Tensor,
    weight: str,
    activation: str,
    *arguments: Any,
) -> Any:
    """As `run`, for a call that gives operands which have a default: by a provider that takes them.

    An `addend` is added in fp32 to the result of a kernel that does not take it, at the cost of one more
    rounding. Raises KernelError where a named provider does not take another, or none does.
    """
    given = frozenset(optional)
    found = _chosen_with(op, kernel, x.device, x.dtype, weight, activation, given)
    if given <= found.takes:
        return found.function(*arguments, **optional)
    taken = {name: value for name, value in optional.items() if name in found.takes}
    result = found.function(*arguments, **taken)
    for name in ADDED_BEHIND & (given - found.takes):
        result = (result.float() + optional[name].float()).to(result.dtype)
    return result


def supporting(query: KernelQuery, kernel: str) -> Provider:
    """Provider `kernel`, or under `"auto"` the preferred one. Raises KernelError where it refuses."""
    if kernel == AUTO:
        return choose(query)
    provider = named(query.op, kernel)
    verdict = provider.verdict(query)
    if verdict is not True:
        raise KernelError(f"kernel {kernel!r} cannot run mixq::{query.op} on {query.device}: {verdict}.")
    return provider


def provider_names() -> tuple[str, ...]:
    """Names of all providers; imports none."""
    return tuple(sorted(folder.name for folder in pkgutil.iter_modules([str(_KERNELS_FOLDER)])))


def linear_query(
    x: torch.Tensor,
    out_features: int,
    in_features: int,
    weight: TensorFormat,
    activation: TensorFormat | None = INT8,
) -> KernelQuery:
    """The query for the product of a linear of these formats; without an activation's, weight-only.

    A product does not see the zero points of an activation: its codes are integers of as many bits.
    """
    told = weight in (INT4, INT8)
    given: frozenset[str] = frozenset()
    if activation is None:
        op = "weight_only_linear"
        if not told:
            given = frozenset({"weight_format"} if weight.signed else {"weight_format", "weight_zero"})
    else:
        op = "mixed_linear" if told else "grouped_linear"
        activation = dataclasses.replace(activation, signed=True)
    return KernelQuery(op, x.device, x.dtype, weight, activation, in_features, out_features, given)


def refused_format(query: KernelQuery) -> str | None:
    """Why kernels of a row's one scale do not compute with the formats of a query; None where they do."""
    for fmt in (query.weight, query.activation):
        if fmt is not None and (not fmt.per_row or fmt.bits not in (4, 8)):
            return f"it computes with int8 and int4, with one scale a row, not with {fmt}"
    return None


def small_batch_limit(query: KernelQuery, kernel: str = AUTO) -> int:
    """The largest M that the weight-only path serves better with this provider; 0 for none."""
    chosen = supporting(query, kernel)
    return chosen.small_batch(query) if chosen.small_batch else 0
