"""What calibration learned about each linear's input: values, look-ups, and one file on disk."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixq_compile.calibration import statistics_file
from mixq_compile.calibration.collected import FURTHER, channels
from mixq_compile.calibration.linear_statistics import LinearStatistics
from mixq_compile.errors import OptionError, StatisticsError

CHANNELS_VERSION = 1
"""Schema version of statistics of the kind `channels` alone, which every release reads."""
KINDS_VERSION = 2
"""Schema version of statistics of further kinds."""
NAMES_SHOWN = 5
"""Most names that a message lists."""


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """The statistics of all linears of one model, by name; made by `calibrate`.

    Names are found under other prefixes too: `model.model.layers.0.fc` where a wrapper was around
    the model, `layers.0.fc` where only a part of it was captured.

        >>> stats = CalibrationStats.load("stats.safetensors")
        >>> stats.outlier_columns("model.layers.0.mlp.down_proj", threshold=6.0)
        [17, 401]
        >>> stats["model.layers.0.mlp.down_proj"].absmax.shape
        torch.Size([1024])
    """

    linears: Mapping[str, LinearStatistics]
    never_run: tuple[str, ...]
    """Linears of the model that no batch reached: they have no statistics."""
    thresholds: tuple[float, ...]
    """Magnitudes that `rows_above` counts; the first is the default of `outlier_columns`."""
    model_class: str
    dtype: str
    """The model's dtype during calibration, for example `float32`."""
    package_version: str

    def __post_init__(self) -> None:
        kinds = {entry.kinds for entry in self.linears.values()}
        if len(kinds) > 1:
            listed = "; ".join(sorted(" and ".join(each) for each in kinds))
            raise StatisticsError(
                f"the linears of {self.model_class} have statistics of different kinds ({listed}): "
                "calibrate them in one run, with the same kinds."
            )

    def __repr__(self) -> str:
        """What they are of, without the tensors."""
        never = f", {len(self.never_run)} never ran" if self.never_run else ""
        return (
            f"<CalibrationStats of {len(self)} linears of {self.model_class} ({self.dtype}): "
            f"{self.total_rows} rows, {' and '.join(self.kinds)}{never}>"
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of statistics that were collected of each linear, `channels` first."""
        return next((entry.kinds for entry in self.linears.values()), ("channels",))

    @property
    def total_rows(self) -> int:
        """Finite rows of the linear that saw most of them: in a language model, the tokens run."""
        return max((entry.rows for entry in self.linears.values()), default=0)

    def __len__(self) -> int:
        return len(self.linears)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __contains__(self, fqn: object) -> bool:
        return isinstance(fqn, str) and self.find(fqn) is not None

    def __getitem__(self, fqn: str) -> LinearStatistics:
        """The statistics of this linear. Raises StatisticsError where there are none."""
        found = self.find(fqn)
        if found is None:
            why = "it never ran during calibration" if fqn in self.never_run else "no such linear was seen"
            raise StatisticsError(
                f"no statistics of linear {fqn!r}: {why}. They are of {len(self)} linears of "
                f"{self.model_class}, such as {_listed(self.linears)}. Calibrate this model."
            )
        return found

    def find(self, fqn: str) -> LinearStatistics | None:
        """The statistics of this linear, None where there are none.

        An exact name wins; else the longest common suffix, at a dot, that is one of the two names in
        full. Raises StatisticsError where several linears match equally well.
        """
        name = self._resolve(fqn)
        return None if name is None else self.linears.get(name)

    def never_ran(self, fqn: str) -> bool:
        """True for a linear, found as by `find`, that was there in calibration and never called.

        Raises StatisticsError where several linears match equally well.
        """
        return self._resolve(fqn) in self.never_run

    def outlier_columns(
        self,
        fqn: str,
        threshold: float | None = None,
        count: int | None = None,
        limit_share: float | None = None,
    ) -> list[int]:
        """The input channels of a linear to keep in 16 bit, ascending.

        Args:
            fqn: the linear's name, found as by `find`.
            threshold: takes the columns whose absmax is above this, rounded to fp32 as in the kernels.
                Where neither this nor `count` is given, the first calibrated threshold.
            count: takes so many columns at most, those of largest absmax; of equals, the lowest column.
            limit_share: caps the columns at `floor(limit_share * K)`, again keeping the largest.

        Raises:
            StatisticsError: there are no statistics of this linear.
            OptionError: `threshold`, `count` or `limit_share` is out of range.
        """
        absmax = self[fqn].absmax
        channels = absmax.shape[0]
        if threshold is None and count is None:
            threshold = self.thresholds[0]
        if threshold is not None and (math.isnan(threshold) or threshold <= 0):
            raise OptionError(f"threshold must be above 0, not {threshold}.")
        if count is not None and count < 0:
            raise OptionError(f"count must be 0 or more columns, not {count}.")
        if limit_share is not None and not 0 < limit_share <= 1:
            raise OptionError(
                f"limit_share must be a share of the columns above 0 and up to 1, not {limit_share}."
            )
        most = channels if count is None else min(count, channels)
        if limit_share is not None:
            # 0.29 * 100 is a little less than 29 in binary.
            most = min(most, math.floor(limit_share * channels + 1e-9))
        order = torch.sort(absmax, descending=True, stable=True).indices
        if threshold is not None:
            order = order[absmax[order] > threshold]
        return sorted(order[:most].tolist())

    def check_model(
        self,
        names_and_shapes: Mapping[str, int | Sequence[int]] | Iterable[tuple[str, int | Sequence[int]]],
    ) -> tuple[str, ...]:
        """Checks that the statistics are those of a model with these linears.

        Statistics of further linears are allowed: a captured graph may hold a part of the model.

            >>> for note in stats.check_model(linear_shapes(model)):
            ...     print(note)

        Args:
            names_and_shapes: name of each linear, with its logical shape (N, K) or K alone.

        Returns:
            One note for each linear that the calibrated model had but never ran.

        Raises:
            StatisticsError: a linear is unknown, or has another K; names up to five of them.
        """
        pairs = names_and_shapes.items() if isinstance(names_and_shapes, Mapping) else names_and_shapes
        channels = {fqn: shape if isinstance(shape, int) else shape[-1] for fqn, shape in pairs}
        resolved = {fqn: self._resolve(fqn) for fqn in channels}
        readers = Counter(resolved.values())
        notes: list[str] = []
        differing: list[str] = []
        for fqn, in_features in channels.items():
            name = resolved[fqn]
            entry = None if name is None else self.linears.get(name)
            if name is None:
                differing.append(f"{fqn}: not among the calibrated linears")
            elif readers[name] > 1:
                differing.append(f"{fqn}: shares the calibrated name {name!r} with another linear")
            elif entry is None:
                notes.append(f"{fqn} never ran during calibration and has no statistics")
            elif entry.in_features != in_features:
                differing.append(f"{fqn}: K is {in_features}, calibrated with {entry.in_features}")
        if differing:
            rest = len(differing) - NAMES_SHOWN
            more = f"; and {rest} more" if rest > 0 else ""
            raise StatisticsError(
                f"the statistics belong to another model: {len(differing)} of {len(channels)} linears differ "
                f"from the calibrated {self.model_class}. {'; '.join(differing[:NAMES_SHOWN])}{more}. "
                "Calibrate this model, or load the statistics that belong to it."
            )
        return tuple(notes)

    def sha256(self) -> str:
        """The hash of what the statistics say: names, thresholds, counts and numbers.

        Equal on every machine and for every file layout; the package version and the model's class,
        which change no result, do not enter.
        """
        further = self.kinds[1:]
        facts = {
            "schema_version": KINDS_VERSION if further else CHANNELS_VERSION,
            "thresholds": self.thresholds,
            "never_run": sorted(self.never_run),
            "linears": [
                (fqn, self.linears[fqn].rows, self.linears[fqn].nonfinite_rows)
                for fqn in sorted(self.linears)
            ],
            **({"kinds": self.kinds} if further else {}),
        }
        digest = hashlib.sha256(json.dumps(facts).encode())
        # Kept by object, so that a tensor of several linears is read once.
        digests: dict[int, bytes] = {}
        for fqn in sorted(self.linears):
            entry = self.linears[fqn]
            for name in channels.FIELDS:
                digest.update(_content(getattr(entry, name)))
            for kind in further:
                value = entry.further[kind]
                if id(value) not in digests:
                    digests[id(value)] = hashlib.sha256(_content(value)).digest()
                digest.update(json.dumps(value.shape).encode() + digests[id(value)])
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with JSON metadata, whole or not at all.

        A tensor that several linears share is written once. Raises StatisticsError where the file
        cannot be written.
        """
        further = self.kinds[1:]
        facts: dict[str, Any] = {
            "schema_version": KINDS_VERSION if further else CHANNELS_VERSION,
            "package_version": self.package_version,
            "model_class": self.model_class,
            "dtype": self.dtype,
            "total_rows": self.total_rows,
            "thresholds": self.thresholds,
            "never_run": self.never_run,
            "linears": {
                fqn: {"rows": entry.rows, "nonfinite_rows": entry.nonfinite_rows}
                for fqn, entry in self.linears.items()
            },
            "sha256": self.sha256(),
        }
        tensors = {
            f"{fqn}.{name}": getattr(entry, name)
            for fqn, entry in self.linears.items()
            for name in channels.FIELDS
        }
        for kind in further:
            owners: dict[int, str] = {}
            held_by = {
                fqn: owners.setdefault(id(entry.further[kind]), fqn) for fqn, entry in self.linears.items()
            }
            facts.setdefault("further", {})[kind] = held_by
            tensors.update((f"{fqn}.{kind}", self.linears[fqn].further[kind]) for fqn in owners.values())
        statistics_file.write(Path(path), facts, tensors)

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStats:
        """The statistics that `save` wrote, bit for bit.

        Raises StatisticsError where the file is missing, damaged, no statistics, or of another
        schema version.
        """
        facts, tensors = statistics_file.read(Path(path), (CHANNELS_VERSION, KINDS_VERSION))
        damaged = functools.partial(statistics_file.unreadable, Path(path))
        try:
            stats = cls._assemble(facts, tensors)
            expected = facts["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(f"it is damaged: {type(error).__name__} {error}") from error
        if stats.sha256() != expected:
            raise damaged("it is damaged: its numbers do not have the sha256 that its header names")
        return stats

    @classmethod
    def _assemble(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CalibrationStats:
        """The statistics that facts and tensors of a file stand for."""
        linears: dict[str, LinearStatistics] = {}
        for fqn, counts in facts["linears"].items():
            fields = {name: tensors[f"{fqn}.{name}"] for name in channels.FIELDS}
            in_features = fields["absmax"].shape[0]
            for name, dtype in channels.FIELDS.items():
                expected = (len(facts["thresholds"]), in_features) if name == "rows_above" else (in_features,)
                if fields[name].dtype != dtype or fields[name].shape != expected:
                    raise ValueError(f"{fqn}.{name} is not {dtype} of shape {expected}")
            further: dict[str, Tensor] = {}
            for kind, held_by in facts.get("further", {}).items():
                further[kind] = tensors[f"{held_by[fqn]}.{kind}"]
                if not FURTHER[kind].fits(further[kind], in_features):
                    raise ValueError(f"{fqn}.{kind} does not fit {in_features} input channels")
            linears[fqn] = LinearStatistics(
                fqn=fqn,
                rows=int(counts["rows"]),
                nonfinite_rows=int(counts["nonfinite_rows"]),
                further=further,
                **fields,
            )
        return cls(
            linears=linears,
            never_run=tuple(facts["never_run"]),
            thresholds=tuple(facts["thresholds"]),
            model_class=str(facts["model_class"]),
            dtype=str(facts["dtype"]),
            package_version=str(facts["package_version"]),
        )

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset((*self.linears, *self.never_run))

    @functools.cached_property
    def _names_by_suffix(self) -> dict[str, list[str]]:
        by_suffix: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            for suffix in _suffixes(name):
                by_suffix[suffix].append(name)
        return dict(by_suffix)

    def _resolve(self, fqn: str) -> str | None:
        """The calibrated name that this one stands for."""
        if fqn in self._names:
            return fqn
        longer = self._names_by_suffix.get(fqn, [])
        if len(longer) > 1:
            raise StatisticsError(
                f"the name {fqn!r} is ambiguous in the statistics of {self.model_class}: it ends "
                f"{_listed(sorted(longer))}. Use a longer name."
            )
        if longer:
            return longer[0]
        for suffix in _suffixes(fqn):
            if suffix in self._names:
                return suffix
        return None


def _suffixes(name: str) -> Iterator[str]:
    """The name itself and what follows each of its dots, longest first."""
    parts = name.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in list(names)[:NAMES_SHOWN])


def _content(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU."""
    owned = tensor.contiguous()
    return ctypes.string_at(owned.data_ptr(), owned.nbytes)
