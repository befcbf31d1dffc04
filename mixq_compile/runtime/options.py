"""The backend's options: one frozen dataclass, validated with the valid names in the error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixq_compile.calibration.statistics import CalibrationStats
from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.pipeline import Pipeline
from mixq_compile.runtime import torch_compat
from mixq_compile.scheme import MISS_POLICIES, OutlierPolicy, QuantScheme, get_scheme, scheme_names

LOWERINGS = ("inductor", "aot_eager", "eager")
ON_ERROR = ("raise", "fallback")


@dataclass(frozen=True)
class MixqOptions:
    """Options of `torch.compile(model, backend="mixq", options={...})` and of `mixq.quantize`."""

    scheme: str = "w8a8o16"
    """Name of a scheme; `mixq doctor` lists them."""
    threshold: float | None = None
    """Magnitude above which a column stays in 16 bit. None: the scheme's (6.0)."""
    capacity: int | None = None
    """Most outlier columns of one linear, a multiple of 16. None: min(128, max(16, K/32))."""
    miss: str | None = None
    """What a new outlier column does: exact, lazy, frozen, static or per_call."""
    stats: CalibrationStats | None = None
    """Calibration statistics, or the path of a file of them."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Names, name parts or glob patterns of linears to leave alone."""
    layers: tuple[tuple[str, str], ...] = ()
    """Schemes of single linears: (pattern, scheme) pairs, or a mapping."""
    force: bool = False
    """Quantize every eligible linear, even where it is not faster (for evaluation)."""
    kernel: str = "auto"
    """Name of a kernel provider to use everywhere; auto takes the best one that supports a call."""
    batch_invariant: bool = False
    """One kernel for every batch size: the same row gives the same bits in any batch."""
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
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Inductor configuration to pass on, such as {"max_autotune": True}."""

    def __post_init__(self) -> None:
        defaults = get_scheme(self.scheme).outliers or OutlierPolicy()
        if self.miss is not None and self.miss not in MISS_POLICIES:
            raise unknown_name("miss policy", self.miss, MISS_POLICIES)
        OutlierPolicy(
            threshold=defaults.threshold if self.threshold is None else self.threshold,
            capacity=self.capacity,
        )
        for _, scheme in self.layers:
            if scheme not in scheme_names():
                raise unknown_name("scheme", scheme, scheme_names())
        if self.lowering not in LOWERINGS:
            raise unknown_name("lowering", self.lowering, LOWERINGS)
        if self.on_error not in ON_ERROR:
            raise unknown_name("on_error", self.on_error, ON_ERROR)
        if self.mode is not None and self.mode not in torch_compat.mode_names():
            raise unknown_name("mode", self.mode, torch_compat.mode_names())
        if self.pipeline is not None:
            Pipeline.parse(self.pipeline).build()
        needs_stats = self.miss == "static" and self.stats is None
        if needs_stats and self.quant_scheme.outliers is not None:
            raise OptionError(
                "the policy 'static' takes its outlier columns from calibration, and no stats were given: "
                "pass stats=mixq.calibrate(model, batches), or another policy (the default is 'exact')."
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
        if mode is not None:
            given["mode"] = mode
        stats = given.get("stats")
        if isinstance(stats, (str, os.PathLike)):
            given["stats"] = CalibrationStats.load(Path(stats))
        elif stats is not None and not isinstance(stats, CalibrationStats):
            raise OptionError(
                f"stats must be CalibrationStats or the path of a file of them, not {type(stats).__name__}."
            )
        if isinstance(given.get("ignore"), str):
            given["ignore"] = tuple(part for part in given["ignore"].split(",") if part)
        elif "ignore" in given:
            given["ignore"] = tuple(given["ignore"])
        layers = given.get("layers", ())
        given["layers"] = tuple(layers.items() if isinstance(layers, Mapping) else map(tuple, layers))
        if isinstance(given.get("scheme"), QuantScheme):
            given["scheme"] = given["scheme"].name
        return cls(**given)

    def inductor_patches(self) -> dict[str, Any]:
        """Inductor's configuration for these options."""
        patches = torch_compat.mode_patches(self.mode) if self.mode else {}
        return {**patches, **self.inductor}
