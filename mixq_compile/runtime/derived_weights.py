"""Tensors computed from parameters by steps, shared by all graphs: scaled and rotated weights, `norm / s`.

A parameter itself is never changed: others may read it. What is derived lives as long as its parameter
and something that uses it: a graph that reads it, or codes packed from it.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixq_compile.errors import MixqError, ReleasedWeightError
from mixq_compile.ir.free_memory import free_bytes
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.state_access import exclusive_access
from mixq_compile.runtime.memory import RESERVE
from mixq_compile.runtime.released_parameter import ADVICE, ReleasedParameter
from mixq_compile.runtime.torch_compat import fingerprint
from mixq_compile.runtime.weight_content import content_of
from mixq_compile.weights.steps.step import Step, computed, result_dtype

NEVER = (0, -1)
"""A `fingerprint` that no tensor has."""
NEEDED = "its equalized or rotated form is computed from it, and again whenever it is written"
"""Why `release_weights` keeps such a parameter."""


@dataclass(eq=False)
class DerivedWeight:
    """A tensor that was computed from one parameter; changed only in place."""

    reference: weakref.ref[Tensor]
    """To the tensor itself."""
    steps: tuple[Step, ...]
    packed_from: tuple[int, int]
    """`fingerprint` of the parameter when it was computed."""
    content: Tensor | None
    """`content_of` the parameter when it was computed; None where it has no data."""
    kept: Tensor | None = None
    """The tensor once codes were packed from it, which live as long as it does."""

    def tensor(self) -> Tensor | None:
        """The tensor; None where nothing uses it any more."""
        return self.reference()


@dataclass(frozen=True)
class _Origin:
    parameter: weakref.ref[Tensor]
    steps: tuple[Step, ...]


@dataclass
class _Entry:
    """What is known of one parameter."""

    derived: dict[Hashable, DerivedWeight] = field(default_factory=dict)
    chosen: dict[Hashable, tuple[tuple[weakref.ref[Tensor], ...], Tensor]] = field(default_factory=dict)


class DerivedWeights:
    """Derived tensors by parameter and steps; parameters are held weakly."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._origins: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def parameter(self, tensor: Tensor) -> Tensor:
        """The parameter that a tensor was derived from; itself where it was not derived."""
        origin: _Origin | None = self._origins.get(tensor)
        found = origin.parameter() if origin is not None else None
        return tensor if found is None else found

    def of(self, parameter: Tensor) -> list[DerivedWeight]:
        """Everything that was derived from a parameter, be it used or not."""
        entry: _Entry | None = self._entries.get(parameter)
        return list(entry.derived.values()) if entry is not None else []

    def derive(self, tensor: Tensor, more: tuple[Step, ...]) -> tuple[Tensor, bool]:
        """A parameter, or what was derived from one, after more steps; and whether it was known before.

        Raises ReleasedWeightError where the parameter was freed, MixqError where memory does not suffice.
        """
        origin: _Origin | None = self._origins.get(tensor)
        parameter = self.parameter(tensor)
        steps = (*origin.steps, *more) if origin is not None else more
        key = (steps, parameter.device, parameter.dtype, tuple(parameter.shape))
        entry = self._entries.get(parameter)
        if entry is None:
            entry = self._entries[parameter] = _Entry()
        known: DerivedWeight | None = entry.derived.get(key)
        found = known.tensor() if known is not None else None
        if found is not None:
            return found, True
        if isinstance(parameter, ReleasedParameter):
            raise ReleasedWeightError(
                f"a weight is to be equalized or rotated, and its values are gone: {ADVICE}"
            )
        made = _computed(parameter, steps)
        if known is None:
            known = entry.derived[key] = DerivedWeight(weakref.ref(made), steps, NEVER, None)
        known.reference = weakref.ref(made)
        if has_data(parameter):
            known.packed_from, known.content = fingerprint(parameter), content_of(parameter)
        self._origins[made] = _Origin(weakref.ref(parameter), steps)
        return made, False

    def keep(self, tensor: Tensor) -> None:
        """Keeps a derived tensor for as long as its parameter lives, because codes are packed from it."""
        for derived in self.of(self.parameter(tensor)):
            if derived.tensor() is tensor:
                derived.kept = tensor

    def choose(self, parameters: Sequence[Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that was chosen once for exactly these parameters, such as their equalizing factors.

        It stays whatever is written to the parameters: what other graphs have derived with it stays valid.
        """
        first, full = parameters[0], (key, tuple(id(each) for each in parameters))
        entry = self._entries.get(first)
        if entry is None:
            entry = self._entries[first] = _Entry()
        found: Tensor | None
        references, found = entry.chosen.get(full, ((), None))
        if found is None or any(
            reference() is not each for reference, each in zip(references, parameters, strict=True)
        ):
            found = make()
            entry.chosen[full] = tuple(weakref.ref(each) for each in parameters), found
        return found

    def refresh(self, parameter: Tensor, look: bool) -> list[Tensor]:
        """Computes again, in place, what a written parameter's derived tensors are; returns those.

        torch's count of writes and the address tell; with `look`, the content does too.
        """
        derived = self.of(parameter)
        if not derived or not has_data(parameter) or isinstance(parameter, ReleasedParameter):
            return []
        now = fingerprint(parameter)
        if not look and all(each.packed_from == now for each in derived):
            return []
        content = content_of(parameter)
        written: list[Tensor] = []
        for each in derived:
            if each.packed_from == now and (not look or _is_equal(each.content, content)):
                continue
            tensor = each.tensor()
            if tensor is not None and not _fits(tensor, parameter, each.steps):
                continue
            if tensor is not None:
                # Computed first, because nothing should take long while other threads' calls wait.
                values = _computed(parameter, each.steps)
                with exclusive_access(tensor.device), torch.no_grad():
                    tensor.copy_(values)
                written.append(tensor)
            each.packed_from, each.content = now, content
        return written


def _is_equal(before: Tensor | None, now: Tensor) -> bool:
    return before is not None and before.device == now.device and torch.equal(before, now)


def _fits(tensor: Tensor, parameter: Tensor, steps: Sequence[Step]) -> bool:
    """False where the parameter was moved, cast or reshaped since: it then has other derived tensors."""
    return (tensor.device, tensor.dtype, tensor.shape) == (
        parameter.device,
        result_dtype(parameter, steps),
        parameter.shape,
    )


def _computed(parameter: Tensor, steps: Sequence[Step]) -> Tensor:
    dtype = result_dtype(parameter, steps)
    if not has_data(parameter):
        return parameter.new_empty(parameter.shape, dtype=dtype)
    needed, available = parameter.numel() * dtype.itemsize, free_bytes(parameter.device)
    if available is not None and needed > available * (1 - RESERVE):
        raise MixqError(
            f"an equalized or rotated weight takes {needed / 2**20:.0f} MiB beside the parameter, and "
            f"{parameter.device} has {available / 2**20:.0f} MiB free: leave the pass that asks for it out."
        )
    # An inference tensor could not be written in place later.
    with torch.inference_mode(False), torch.no_grad():
        return computed(parameter, steps)


def digest_of(tensor: Tensor) -> str:
    """A text that differs for tensors of other numbers; part of a key for `choose`."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
