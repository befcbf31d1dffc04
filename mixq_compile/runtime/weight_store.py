"""Packed weights and outlier states of ordinary models, shared by all graphs compiled from them.

A recompilation (another batch size, another grad mode) finds the packed weight and the warm state
of the first compilation here: nothing is packed twice. Entries live as long as their parameter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixq_compile.errors import MixqError
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.joint_rows import held_bytes
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.state_access import exclusive_access
from mixq_compile.ops.weight_codes import codes_dtype, quantize_weight
from mixq_compile.runtime import memory
from mixq_compile.runtime.derived_weights import NEVER, DerivedWeight, DerivedWeights
from mixq_compile.runtime.released_parameter import ReleasedParameter, give_up_memory
from mixq_compile.runtime.torch_compat import fingerprint
from mixq_compile.runtime.weight_content import content_of
from mixq_compile.scheme import QuantScheme, WeightRecipe
from mixq_compile.weights.steps.step import Step

log = logging.getLogger(__name__)


@dataclass(eq=False)
class WeightCodes:
    """The integer codes of one weight; changed only in place."""

    weight_codes: Tensor
    """[N, K] int8, or [N, ceil(K/2)] uint8 with two 4-bit codes a byte."""
    weight_scale: Tensor
    """[N] fp32."""
    recipe: WeightRecipe
    transposed: bool
    """True where the parameter is [K, N], as GPT-2's Conv1D has it."""
    packed_from: tuple[int, int]
    """`fingerprint` of the parameter when it was packed."""
    content: Tensor | None
    """`content_of` the parameter when it was packed; None where it has no data."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return held_bytes(self.weight_codes) + held_bytes(self.weight_scale)


@dataclass
class PackedWeight:
    """Codes of one weight, and the cache of outlier columns of one capacity and dtype."""

    codes: WeightCodes
    outlier_weight: Tensor
    """[N, C] in the activation's dtype: the weight columns of the slots in `cached_index`."""
    cached_index: Tensor
    """[C] int32, -1 where a slot is empty."""

    @property
    def weight_codes(self) -> Tensor:
        """The codes' tensor."""
        return self.codes.weight_codes

    @property
    def weight_scale(self) -> Tensor:
        """The scales' tensor."""
        return self.codes.weight_scale

    def fetch(self, weight: Tensor, slots: Tensor) -> None:
        """Copies the columns that these slots of `cached_index` name from the parameter."""
        columns = self.cached_index[slots].long()
        source = _as_matrix(weight, self.codes.transposed)
        self.outlier_weight[:, slots] = source[:, columns].to(self.outlier_weight.dtype)


@dataclass(frozen=True)
class _StateKey:
    threshold: float
    capacity: int
    miss: str
    bits: int
    device: torch.device
    columns: tuple[int, ...] | None
    readers: frozenset[int]
    """ids of all parameters that read the value."""


@dataclass
class _Entry:
    """What is known of one parameter."""

    codes: dict[tuple[WeightRecipe, bool, torch.device], WeightCodes] = field(default_factory=dict)
    packed: dict[tuple[WeightRecipe, bool, torch.device, int, torch.dtype], PackedWeight] = field(
        default_factory=dict
    )
    states: dict[_StateKey, OutlierState] = field(default_factory=dict)
    kept_because: str | None = None
    """Why `release_weights` left the parameter its memory."""


def _as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    return weight.detach().t() if transposed else weight.detach()


class WeightStore:
    """Packed weights and outlier states, weakly keyed by parameter."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._writing = threading.RLock()
        self._held: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.derived = DerivedWeights()
        """What is computed from parameters before it is packed or read."""
        self.releases = 0
        """How often a parameter's storage was freed: a graph that reads 16-bit weights looks again then."""

    def _entry(self, weight: Tensor) -> _Entry:
        entry = self._known(weight)
        if entry is None:
            entry = self._entries[weight] = _Entry()
        return entry

    def _known(self, weight: Tensor) -> _Entry | None:
        found: _Entry | None = self._entries.get(weight)
        return found

    def prepare(self, weights: Sequence[tuple[Tensor, QuantScheme]], keeps_originals: bool) -> None:
        """Checks the memory that packing these parameters takes, before any is packed.

        Raises MixqError where it does not fit; says once what keeping both copies costs.
        """
        unpacked: dict[int, tuple[Tensor, QuantScheme]] = {}
        for weight, scheme in weights:
            entry = self._known(weight)
            if has_data(weight) and not (entry and entry.codes):
                unpacked[id(weight)] = weight, scheme
        if unpacked:
            memory.check(list(unpacked.values()), keeps_originals)

    def pack(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, transposed: bool = False
    ) -> PackedWeight:
        """The packed form of a parameter `[N, K]` (`[K, N]` if transposed); packs it on first use.

        Raises MixqError where the weight has been released and was never packed this way.
        """
        out_features, in_features = _as_matrix(weight, transposed).shape
        capacity = scheme.outliers.capacity_for(in_features) if scheme.outliers else 0
        with self._writing:
            self.derived.keep(weight)
            entry = self._entry(weight)
            codes = self._codes(entry, weight, scheme, transposed)
            key = (scheme.recipe, transposed, weight.device, capacity, dtype)
            if key not in entry.packed:
                entry.packed[key] = PackedWeight(
                    codes=codes,
                    outlier_weight=weight.new_zeros((out_features, capacity), dtype=dtype),
                    cached_index=weight.new_full((capacity,), -1, dtype=torch.int32),
                )
            return entry.packed[key]

    def _codes(self, entry: _Entry, weight: Tensor, scheme: QuantScheme, transposed: bool) -> WeightCodes:
        key = (scheme.recipe, transposed, weight.device)
        if key in entry.codes:
            self.refresh(weight, look=True)
            return entry.codes[key]
        if self.is_released(weight):
            raise MixqError(
                "a weight was freed by release_weights and cannot be packed again with other options "
                f"(scheme {scheme.name!r}). Load the model again, or compile without release_weights."
            )
        matrix = _as_matrix(weight, transposed)
        if not has_data(weight):
            out_features, in_features = matrix.shape
            shape, dtype = scheme.weight.codes_shape(out_features, in_features), codes_dtype(scheme.weight)
            codes = weight.new_empty(shape, dtype=dtype)
            scale = weight.new_empty((out_features,), dtype=torch.float32)
        else:
            codes, scale = quantize_weight(matrix, scheme.recipe)
        packed_from = fingerprint(weight) if has_data(weight) else (0, 0)
        content = content_of(weight) if has_data(weight) else None
        entry.codes[key] = WeightCodes(codes, scale, scheme.recipe, transposed, packed_from, content)
        return entry.codes[key]

    def derive(self, weight: Tensor, *steps: Step) -> Tensor:
        """A parameter, or what was derived from one, after more steps; the same tensor for every graph.

        It follows when the parameter is written, as codes do. Raises ReleasedWeightError where the
        parameter was freed, MixqError where memory does not suffice.
        """
        with self._writing:
            derived, known = self.derived.derive(weight, steps)
            if known:
                self.refresh(self.derived.parameter(weight), look=True)
            return derived

    def choose(self, weights: Sequence[Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gave when it was first asked for by this key and exactly these parameters."""
        with self._writing:
            return self.derived.choose(weights, key, make)

    def fill(self, packed: PackedWeight, weight: Tensor, state: OutlierState) -> None:
        """Fetches the columns that the state knows from the parameter into the outlier weight, now."""
        if not has_data(weight) or self.is_released(weight):
            return
        with exclusive_access(weight.device):
            count = len(state.columns())
            if count:
                packed.cached_index[:count] = state.index[:count]
                slots = torch.arange(count, dtype=torch.int64, device=packed.cached_index.device)
                packed.fetch(weight, slots)

    def state(
        self,
        weights: Sequence[Tensor],
        scheme: QuantScheme,
        in_features: int,
        columns: Sequence[int] | None = None,
        column_max: Sequence[float] | None = None,
    ) -> OutlierState:
        """The outlier state of the value that exactly these parameters read; created on first use.

        `columns` are calibrated ones that a new state starts with.
        """
        policy = scheme.outliers
        first = weights[0]
        key = _StateKey(
            threshold=policy.threshold if policy else float("inf"),
            capacity=policy.capacity_for(in_features) if policy else 0,
            miss=policy.miss if policy else "static",
            bits=scheme.activation.bits if scheme.activation else 16,
            device=first.device,
            columns=tuple(columns) if columns is not None else None,
            readers=frozenset(id(weight) for weight in weights),
        )
        with self._writing:
            return self._state(weights, scheme, in_features, key, columns, column_max)

    def _state(
        self,
        weights: Sequence[Tensor],
        scheme: QuantScheme,
        in_features: int,
        key: _StateKey,
        columns: Sequence[int] | None,
        column_max: Sequence[float] | None,
    ) -> OutlierState:
        first, policy = weights[0], scheme.outliers
        states = self._entry(first).states
        if key not in states:
            state = OutlierState.create(in_features, key.capacity, key.threshold, first.device)
            if columns is not None and policy is not None and has_data(first):
                state.preload(columns, column_max)
                if policy.miss in ("frozen", "static"):
                    state.freeze()
            if any(self.derived.parameter(weight) in self._held for weight in weights):
                state.hold()
            for weight in weights:
                self._entry(weight).states[key] = state
        return states[key]

    def hold(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Holds the states of these parameters, those still to be made too; returns which were not held."""
        with self._writing:
            new = [weight for weight in weights if weight not in self._held]
            for weight in new:
                self._held[weight] = True
            return new

    def let_go(self, weights: Iterable[Tensor]) -> None:
        """Ends what `hold` began for these parameters."""
        with self._writing:
            for weight in weights:
                self._held.pop(weight, None)

    def bind(self, kept: Tensor, bound: Tensor) -> None:
        """Makes one state buffer of a MixqLinear share the storage of another's, values included.

        So eager calls of either module and compiled calls of both agree on the outlier columns.
        """
        if kept.data_ptr() != bound.data_ptr():
            with exclusive_access(kept.device):
                bound.data = kept.data

    def refresh(self, weight: Tensor, look: bool = False) -> bool:
        """Packs a parameter again, in place, if it has been written since. True if it was.

        torch's count of writes and the address tell; with `look`, the content does too.
        """
        with self._writing:
            again = self.derived.refresh(weight, look)
            for derived in again:
                self.refresh(derived)
            entry = self._known(weight)
            if entry is None or not has_data(weight) or self.is_released(weight):
                return bool(again)
            now, content = fingerprint(weight), None
            here = [codes for codes in entry.codes.values() if codes.weight_codes.device == weight.device]
            stale = [codes for codes in here if codes.packed_from != now]
            if look:
                content = content_of(weight)
                stale = [
                    codes
                    for codes in here
                    if codes in stale or codes.content is None or not torch.equal(codes.content, content)
                ]
            if stale:
                log.info("a parameter was written since it was packed: packed again")
                self._pack_again(entry, weight, stale)
                content = content_of(weight) if content is None else content
                for codes in stale:
                    codes.packed_from, codes.content = now, content
            return bool(stale or again)

    def _pack_again(self, entry: _Entry, weight: Tensor, stale: Sequence[WeightCodes]) -> None:
        # Solved first, because nothing should take long while other threads' calls wait.
        fresh = [quantize_weight(_as_matrix(weight, codes.transposed), codes.recipe) for codes in stale]
        with exclusive_access(weight.device):
            for codes, (values, scale) in zip(stale, fresh, strict=True):
                codes.weight_codes.copy_(values)
                codes.weight_scale.copy_(scale)
                for packed in entry.packed.values():
                    if packed.codes is codes:
                        packed.fetch(weight, (packed.cached_index >= 0).nonzero().flatten())

    def release(self, weight: Tensor) -> None:
        """Frees the memory of a packed parameter; its packed form is all that is left of it.

        Raises RuntimeError where torch cannot free it: nothing is changed then.
        """
        entry = self._entry(weight)
        give_up_memory(weight)
        entry.kept_because = None
        # Data given to the parameter later may lie at the freed address.
        for codes in entry.codes.values():
            codes.packed_from, codes.content = NEVER, None
        self.releases += 1

    def keep(self, weight: Tensor, reason: str) -> bool:
        """Remembers why a parameter's memory is not freed. True where that is new."""
        entry = self._entry(weight)
        is_new = entry.kept_because != reason
        entry.kept_because = reason
        return is_new

    def kept_because(self, weight: Tensor) -> str | None:
        """Why `release_weights` kept a parameter's memory; None where it was not asked, or freed it."""
        entry = self._known(weight)
        return entry.kept_because if entry is not None else None

    def is_released(self, weight: Tensor) -> bool:
        """True where a parameter's memory has been freed, and the user gave it no other since."""
        return isinstance(weight, ReleasedParameter)

    def codes(self, weight: Tensor) -> list[WeightCodes]:
        """Every set of codes of a parameter: one for each weight format and device."""
        entry = self._known(weight)
        return list(entry.codes.values()) if entry else []

    def forms(self, weight: Tensor) -> list[Tensor]:
        """A parameter, and all that is derived from it."""
        derived = [tensor for each in self.derived.of(weight) if (tensor := each.tensor()) is not None]
        return [weight, *derived]

    def followers(self, weight: Tensor) -> list[WeightCodes | DerivedWeight]:
        """What is computed again when a parameter is written: its codes, and what is derived from it."""
        return [*self.codes(weight), *self.derived.of(weight)]

    def packed_bytes(self, weight: Tensor) -> int:
        """Bytes of everything kept in place of a parameter, derived tensors included; 0 where nothing is."""
        derived = self.forms(weight)[1:]
        held = sum(each.nbytes + self.packed_bytes(each) for each in derived)
        entry = self._known(weight)
        if entry is None:
            return held
        caches = [held_bytes(p.outlier_weight) + held_bytes(p.cached_index) for p in entry.packed.values()]
        return held + sum(codes.nbytes for codes in entry.codes.values()) + sum(caches)

    def states(self, weights: Iterable[Tensor]) -> list[OutlierState]:
        """Every outlier state of any of these parameters, each once."""
        found: dict[int, OutlierState] = {}
        for form in (form for weight in weights for form in self.forms(weight)):
            entry = self._known(form)
            for state in entry.states.values() if entry else ():
                found[id(state)] = state
        return list(found.values())


STORE = WeightStore()
"""The store of this process: every graph compiled from one parameter shares its packed form."""
