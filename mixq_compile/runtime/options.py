"""The backend's options: one frozen dataclass, validated with the valid names in the error."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixq_compile.calibration.statistics import CalibrationStats
from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.ops.providers import AUTO, provider_names
from mixq_compile.pipeline import Pipeline
from mixq_compile.runtime import torch_compat
from mixq_compile.scheme import MISS_POLICIES, OutlierPolicy, QuantScheme
from mixq_compile.schemes.registry import accepted_names, get_scheme, register
from mixq_compile.selection.statistics import check_given
from mixq_compile.thresholds import DEFAULT_THRESHOLD, Threshold

LOWERINGS = ("inductor", "aot_eager", "eager")
ON_ERROR = ("raise", "fallback")
WHEN = ("auto", "always", "never")
_SWITCHES = ("force", "batch_invariant", "release_weights")
_NAMES: dict[str, Callable[[], Sequence[str]]] = {
    "scheme": accepted_names,
    "miss": lambda: MISS_POLICIES,
    "lowering": lambda: LOWERINGS,
    "on_error": lambda: ON_ERROR,
    "mode": torch_compat.mode_names,
    "merge_siblings": lambda: WHEN,
    "kernel": lambda: (AUTO, *provider_names()),
}
"""Options that are one of several names, and what gives the valid ones."""


@dataclass(frozen=True)
class MixqOptions:
    """Options of `torch.compile(model, backend="mixq", options={...})` and of `mixq.quantize`."""

    scheme: str = "w8a8o16"
    """Name of a scheme, which `mixq doctor` lists, or a QuantScheme of your own."""
    threshold: Threshold | None = None
    """Magnitude above which a column stays in 16 bit, or a multiple of its row's mean magnitude, such as
    "8x". None: the scheme's (8x)."""
    capacity: int | None = None
    """Most outlier columns of one linear, a multiple of 16. None: min(128, max(16, K/16)); K/32 where the
    threshold is a magnitude."""
    miss: str | None = None
    """What a new outlier column does: exact, lazy, frozen, static or per_call."""
    stats: CalibrationStats | None = None
    """Calibration statistics, or the path of a file of them."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Linears to leave alone: runs of dotted name parts (`mlp.down_proj`), globs (`layers.*.q_proj`), or
    `re:` and an expression for the whole name."""
    layers: tuple[tuple[str, str], ...] = ()
    """Schemes of single linears: (pattern, scheme) pairs, or a mapping; wins over `ignore`, and over what
    makes a linear a head or a router."""
    force: bool = False
    """Quantize every eligible linear, even where it is not faster (for evaluation)."""
    kernel: str = "auto"
    """Name of a kernel provider to use everywhere; auto takes the best one that supports a call."""
    batch_invariant: bool = False
    """One kernel for every batch size: the same row gives the same bits in any batch."""
    merge_siblings: str = "auto"
    """One product for linears that read one value: auto (where the kernels gain by it), always or never."""
    release_weights: bool = False
    """Free the 16-bit weights after packing. Destructive: the model cannot run uncompiled any more."""
    mode: str | None = None
    """A `torch.compile` mode, for example reduce-overhead (CUDA graphs)."""
    lowering: str = "inductor"
    """What compiles the rewritten graph: inductor, aot_eager (no code generation) or eager."""
    on_error: str = "raise"
    """raise, or fallback: compile the unquantized graph and say so."""
    pipeline: str | None = None
    """A pipeline's name or text in place of the one chosen automatically."""
    report: str | None = None
    """A file, such as report.html, to write what each pass did to each compiled graph."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor configuration to pass on, such as {"max_autotune": True}."""

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        for name, valid in _NAMES.items():
            value = getattr(self, name)
            if value is not None and value not in valid():
                raise unknown_name(name, value, valid())
        for _, scheme in self.layers:
            get_scheme(scheme)
        OutlierPolicy(
            threshold=DEFAULT_THRESHOLD if self.threshold is None else self.threshold, capacity=self.capacity
        )
        if self.report is not None and not Path(self.report).expanduser().resolve().parent.is_dir():
            raise OptionError(f"report={self.report!r} lies in a folder that does not exist: make it first.")
        if self.pipeline is not None:
            Pipeline.parse(self.pipeline).build()
        if self.miss == "static" and self.stats is None and self.quant_scheme.outliers is not None:
            raise OptionError(
                "the policy 'static' takes its outlier columns from calibration, and no stats were given: "
                "pass stats=mixq_compile.calibrate(model, batches), or another policy (default: 'exact')."
            )
        check_given(self.stats, [get_scheme(name) for name in (self.scheme, *dict(self.layers).values())])
        if self.release_weights:
            self.check_codes_only("release_weights, which an export implies, frees")

    def check_codes_only(self, what_frees: str) -> None:
        """Raises OptionError where new outlier columns would have to be rebuilt from 4-bit codes.

        `what_frees` begins the sentence: what frees the 16-bit weights.
        """
        for name in (self.scheme, *(scheme for _, scheme in self.layers)):
            scheme = get_scheme(name)
            miss = self.miss or (scheme.outliers.miss if scheme.outliers is not None else None)
            fixed = self.stats is not None and miss in ("static", "frozen")
            if scheme.weight.bits == 4 and scheme.outliers is not None and not fixed:
                raise OptionError(
                    f"{what_frees} the 16-bit weights, and {name} needs them for outlier columns that it "
                    "finds while running: 4-bit codes are too coarse for those. Calibrate, and pass stats "
                    "with miss='static'; or keep the 16-bit weights."
                )

    def warn_of_missing_statistics(self, stacklevel: int) -> None:
        """Warns of schemes that quantize activations to 4 bit where no statistics choose their columns."""
        if self.stats is not None:
            return
        for name in dict.fromkeys([self.scheme, *(scheme for _, scheme in self.layers)]):
            activation = get_scheme(name).activation
            if activation is not None and activation.bits == 4:
                warnings.warn(
                    f"mixq: {name} quantizes activations to 4 bit, and no stats were given: its 16-bit "
                    "columns are found by magnitude alone while the model runs, which costs accuracy. "
                    "Calibrate: stats=mixq_compile.calibrate(model, batches).",
                    stacklevel=stacklevel + 1,
                )

    @property
    def quant_scheme(self) -> QuantScheme:
        """The scheme with the options for outliers applied."""
        changes = {
            name: value
            for name in ("threshold", "capacity", "miss")
            if (value := getattr(self, name)) is not None
        }
        return get_scheme(self.scheme).with_outliers(**changes)

    @classmethod
    def from_user(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> MixqOptions:
        """Options from what `torch.compile` hands to a backend.

        Raises OptionError for an unknown name (with the valid ones) or a wrong value.
        """
        given = dict(options or {})
        valid = [entry.name for entry in dataclasses.fields(cls)]
        for name in given:
            if name not in valid:
                raise unknown_name("option", name, valid)
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise OptionError(
                f"the mode is given twice, as {mode!r} and as option {given['mode']!r}: give one."
            )
        stats = given.get("stats")
        if isinstance(stats, (str, os.PathLike)):
            given["stats"] = CalibrationStats.load(Path(stats))
        elif stats is not None and not isinstance(stats, CalibrationStats):
            raise OptionError(
                f"stats must be CalibrationStats or the path of a file of them, not {type(stats).__name__}."
            )
        if isinstance(given.get("report"), os.PathLike):
            given["report"] = os.fspath(given["report"])
        if "ignore" in given:
            given["ignore"] = _names_in(given["ignore"])
        if "layers" in given:
            given["layers"] = _pairs_in(given["layers"])
        if isinstance(given.get("scheme"), QuantScheme):
            given["scheme"] = register(given["scheme"]).name
        return cls(**given)

    def inductor_patches(self) -> dict[str, Any]:
        """Inductor's configuration for these options."""
        patches = torch_compat.mode_patches(self.mode) if self.mode else {}
        return {**patches, **self.inductor}


def _names_in(ignore: Any) -> tuple[str, ...]:
    names = ignore.split(",") if isinstance(ignore, str) else ignore
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) for name in names
    ):
        raise OptionError(f"ignore takes names of linears, for example ['lm_head'], not {ignore!r}.")
    return tuple(name for name in names if name)


def _pairs_in(layers: Any) -> tuple[tuple[str, str], ...]:
    pairs = layers.items() if isinstance(layers, Mapping) else layers
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise OptionError(
            f"layers takes {{pattern: scheme}}, for example {{'*.down_proj': 'w8a8'}}, not {layers!r}."
        )
    return tuple(
        (str(pattern), register(scheme).name if isinstance(scheme, QuantScheme) else scheme)
        for pattern, scheme in pairs
    )
