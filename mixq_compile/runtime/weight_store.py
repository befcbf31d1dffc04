"""Packed weights and outlier states of ordinary models, shared by all graphs compiled from them.

A recompilation (another batch size, another grad mode) finds the packed weight and the warm state
of the first compilation here: nothing is packed twice. Entries live as long as their parameter.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixq_compile.errors import MixqError
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.joint_rows import held_bytes
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.state_access import exclusive_access
from mixq_compile.runtime import memory
from mixq_compile.runtime.derived_weights import NEVER, DerivedWeight, DerivedWeights
from mixq_compile.runtime.released_parameter import ReleasedParameter, give_up_memory
from mixq_compile.runtime.stored_weight import Entry, PackedWeight, StateKey, StoredWeight, WeightKey
from mixq_compile.runtime.torch_compat import fingerprint
from mixq_compile.runtime.weight_content import content_of
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights.recipe import InputStatistics
from mixq_compile.weights.steps.step import Step

log = logging.getLogger(__name__)


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

    def _entry(self, weight: Tensor) -> Entry:
        entry = self._known(weight)
        if entry is None:
            entry = self._entries[weight] = Entry()
        return entry

    def _known(self, weight: Tensor) -> Entry | None:
        found: Entry | None = self._entries.get(weight)
        return found

    def prepare(self, weights: Sequence[tuple[Tensor, QuantScheme]], keeps_originals: bool) -> None:
        """Checks the memory that packing these parameters takes, before any is packed.

        Raises MixqError where it does not fit; says once what keeping both copies costs.
        """
        unpacked: dict[int, tuple[Tensor, QuantScheme]] = {}
        for weight, scheme in weights:
            entry = self._known(weight)
            known = {key.recipe for key in entry.stored} if entry else ()
            if has_data(weight) and scheme.recipe not in known:
                unpacked[id(weight)] = weight, scheme
        if unpacked:
            memory.check(list(unpacked.values()), keeps_originals)

    def pack(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        dtype: torch.dtype,
        transposed: bool = False,
        statistics: InputStatistics | None = None,
    ) -> PackedWeight:
        """The packed form of a parameter `[N, K]` (`[K, N]` if transposed); packs it on first use.

        `statistics` are those of the linear's inputs. Raises MixqError where the weight has been released and
        was never packed this way, StatisticsError where its recipe needs statistics and none were given.
        """
        key = WeightKey.of(weight, scheme, dtype, transposed, statistics)
        out_features, in_features = key.matrix(weight).shape
        capacity = scheme.outliers.capacity_for(in_features) if scheme.outliers else 0
        with self._writing:
            self.derived.keep(weight)
            entry = self._entry(weight)
            stored = self._stored(entry, weight, scheme.name, key, statistics)
            place = (key, capacity, dtype)
            if place not in entry.packed:
                entry.packed[place] = PackedWeight(
                    stored=stored,
                    outlier_weight=weight.new_zeros((out_features, capacity), dtype=dtype),
                    cached_index=weight.new_full((capacity,), -1, dtype=torch.int32),
                )
            return entry.packed[place]

    def _stored(
        self,
        entry: Entry,
        weight: Tensor,
        scheme: str,
        key: WeightKey,
        statistics: InputStatistics | None,
    ) -> StoredWeight:
        if key in entry.stored:
            self.refresh(weight, look=True)
            return entry.stored[key]
        if self.is_released(weight):
            raise MixqError(
                "a weight was freed by release_weights and cannot be packed again with other options "
                f"(scheme {scheme!r}). Load the model again, or compile without release_weights."
            )
        tensors = StoredWeight.solve(key, weight, statistics)
        packed_from = fingerprint(weight) if has_data(weight) else (0, 0)
        content = content_of(weight) if has_data(weight) else None
        entry.stored[key] = StoredWeight(key, tensors, statistics, packed_from, content)
        return entry.stored[key]

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
        key = StateKey(
            threshold=policy.threshold if policy else float("inf"),
            capacity=policy.capacity_for(in_features) if policy else 0,
            miss=policy.miss if policy else "static",
            format=str(scheme.activation) if scheme.activation else None,
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
        key: StateKey,
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
            here = [codes for codes in entry.stored.values() if codes.weight_codes.device == weight.device]
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

    def _pack_again(self, entry: Entry, weight: Tensor, stale: Sequence[StoredWeight]) -> None:
        # Solved first, because nothing should take long while other threads' calls wait.
        fresh = [StoredWeight.solve(each.key, weight, each.statistics) for each in stale]
        with exclusive_access(weight.device):
            for stored, tensors in zip(stale, fresh, strict=True):
                stored.replace(tensors)
                for packed in entry.packed.values():
                    if packed.stored is stored:
                        packed.fetch(weight, (packed.cached_index >= 0).nonzero().flatten())

    def release(self, weight: Tensor) -> None:
        """Frees the memory of a packed parameter; its packed form is all that is left of it.

        Raises RuntimeError where torch cannot free it: nothing is changed then.
        """
        entry = self._entry(weight)
        give_up_memory(weight)
        entry.kept_because = None
        # Data given to the parameter later may lie at the freed address.
        for codes in entry.stored.values():
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

    def codes(self, weight: Tensor) -> list[StoredWeight]:
        """Every packed form of a parameter: one for each recipe and device."""
        entry = self._known(weight)
        return list(entry.stored.values()) if entry else []

    def forms(self, weight: Tensor) -> list[Tensor]:
        """A parameter, and all that is derived from it."""
        derived = [tensor for each in self.derived.of(weight) if (tensor := each.tensor()) is not None]
        return [weight, *derived]

    def followers(self, weight: Tensor) -> list[StoredWeight | DerivedWeight]:
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
        return held + sum(stored.nbytes for stored in entry.stored.values()) + sum(caches)

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
