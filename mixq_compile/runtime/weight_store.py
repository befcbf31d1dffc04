"""Packed weights and outlier states of ordinary models, shared by all graphs compiled from them.

A recompilation (another batch size, another grad mode) finds the packed weight and the warm state
of the first compilation here: nothing is packed twice. Entries live as long as their parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixq_compile.errors import MixqError
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.runtime.torch_compat import fingerprint
from mixq_compile.scheme import QuantScheme, TensorFormat

log = logging.getLogger(__name__)


@dataclass
class PackedWeight:
    """Codes of one weight and its cache of outlier columns; changed only in place."""

    weight_codes: Tensor
    """[N, K] int8, or [N, ceil(K/2)] uint8 with two 4-bit codes a byte."""
    weight_scale: Tensor
    """[N] fp32."""
    outlier_weight: Tensor
    """[N, C] in the activation's dtype: the weight columns of the slots in `cached_index`."""
    cached_index: Tensor
    """[C] int32, -1 where a slot is empty."""
    format: TensorFormat
    transposed: bool
    """True where the parameter is [K, N], as GPT-2's Conv1D has it."""
    packed_from: tuple[int, int] = (0, 0)
    released: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept in place of the 16-bit weight."""
        kept = (self.weight_codes, self.weight_scale, self.outlier_weight, self.cached_index)
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)


@dataclass(frozen=True)
class _StateKey:
    threshold: float
    capacity: int
    miss: str
    bits: int
    columns: tuple[int, ...] | None
    readers: frozenset[int]
    """ids of all parameters that read the value."""


@dataclass
class _Entry:
    packed: dict[tuple[TensorFormat, int, bool, torch.dtype, torch.device], PackedWeight] = field(
        default_factory=dict
    )
    states: dict[_StateKey, OutlierState] = field(default_factory=dict)


def _as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    return weight.detach().t() if transposed else weight.detach()


class WeightStore:
    """Packed weights and outlier states, weakly keyed by parameter."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _entry(self, weight: Tensor) -> _Entry:
        entry: _Entry | None = self._entries.get(weight)
        if entry is None:
            entry = self._entries[weight] = _Entry()
        return entry

    def pack(
        self, weight: Tensor, scheme: QuantScheme, dtype: torch.dtype, transposed: bool = False
    ) -> PackedWeight:
        """The packed form of a parameter `[N, K]` (`[K, N]` if transposed); packs it on first use.

        Raises MixqError where the weight has been released and was never packed this way.
        """
        out_features, in_features = _as_matrix(weight, transposed).shape
        capacity = scheme.outliers.capacity_for(in_features) if scheme.outliers else 0
        key = (scheme.weight, capacity, transposed, dtype, weight.device)
        entry = self._entry(weight)
        found = entry.packed.get(key)
        if found is not None:
            return found
        if any(packed.released for packed in entry.packed.values()):
            raise MixqError(
                "a weight was freed by release_weights and cannot be packed again with other options "
                f"(scheme {scheme.name!r}). Load the model again, or compile without release_weights."
            )
        if weight.is_meta:
            codes_columns = in_features if scheme.weight.bits == 8 else (in_features + 1) // 2
            codes_dtype = torch.int8 if scheme.weight.bits == 8 else torch.uint8
            codes = weight.new_empty((out_features, codes_columns), dtype=codes_dtype)
            scale = weight.new_empty((out_features,), dtype=torch.float32)
        else:
            codes, scale = quantize_weight(_as_matrix(weight, transposed), scheme.weight)
        packed = PackedWeight(
            weight_codes=codes,
            weight_scale=scale,
            outlier_weight=torch.zeros(out_features, capacity, dtype=dtype, device=weight.device),
            cached_index=torch.full((capacity,), -1, dtype=torch.int32, device=weight.device),
            format=scheme.weight,
            transposed=transposed,
            packed_from=(0, 0) if weight.is_meta else fingerprint(weight),
        )
        entry.packed[key] = packed
        return packed

    def fill(self, packed: PackedWeight, weight: Tensor, state: OutlierState) -> None:
        """Fetches the columns that the state knows from the parameter into the outlier weight, now."""
        columns = state.columns()
        if columns and not weight.is_meta and not packed.released:
            source = _as_matrix(weight, packed.transposed)[:, columns]
            packed.outlier_weight[:, : len(columns)] = source.to(packed.outlier_weight.dtype)
            packed.cached_index[: len(columns)] = state.index[: len(columns)]

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
            policy.threshold if policy else float("inf"),
            policy.capacity_for(in_features) if policy else 0,
            policy.miss if policy else "static",
            scheme.activation.bits if scheme.activation else 16,
            tuple(columns) if columns is not None else None,
            frozenset(id(weight) for weight in weights),
        )
        states = self._entry(first).states
        if key not in states:
            state = OutlierState.create(in_features, key.capacity, key.threshold, first.device)
            if columns is not None and policy is not None and not first.is_meta:
                state.preload(columns, column_max)
                if policy.miss in ("frozen", "static"):
                    state.freeze()
            for weight in weights:
                self._entry(weight).states[key] = state
        return states[key]

    def bind(self, kept: Tensor, bound: Tensor) -> None:
        """Makes one state buffer of a MixqLinear share the storage of another's, values included.

        So eager calls of either module and compiled calls of both agree on the outlier columns.
        """
        if kept.data_ptr() != bound.data_ptr():
            bound.data = kept.data

    def refresh(self, weight: Tensor) -> bool:
        """Packs a parameter again, in place, if it has been written since. True if it was."""
        entry: _Entry | None = self._entries.get(weight)
        changed = False
        for packed in entry.packed.values() if entry else ():
            if packed.packed_from == fingerprint(weight) or weight.is_meta:
                continue
            if packed.weight_codes.device != weight.device:
                continue
            if packed.released and weight.untyped_storage().nbytes() == 0:
                continue
            codes, scale = quantize_weight(_as_matrix(weight, packed.transposed), packed.format)
            packed.weight_codes.copy_(codes)
            packed.weight_scale.copy_(scale)
            packed.cached_index.fill_(-1)
            packed.packed_from = fingerprint(weight)
            changed = True
        if changed:
            log.info("a parameter was written since it was packed: packed again")
        return changed

    def packed(self, weight: Tensor) -> list[PackedWeight]:
        """Every packed form of a parameter."""
        entry: _Entry | None = self._entries.get(weight)
        return list(entry.packed.values()) if entry else []

    def states(self, weights: Iterable[Tensor]) -> list[OutlierState]:
        """Every outlier state of any of these parameters, each once."""
        found: dict[int, OutlierState] = {}
        for weight in weights:
            entry: _Entry | None = self._entries.get(weight)
            for state in entry.states.values() if entry else ():
                found[id(state)] = state
        return list(found.values())


STORE = WeightStore()
"""The store of this process: every graph compiled from one parameter shares its packed form."""
