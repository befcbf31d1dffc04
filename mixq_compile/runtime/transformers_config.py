"""`MixqConfig`: what transformers' `from_pretrained` is told, and what `config.json` tells it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from mixq_compile.checkpoints.schema import QUANT_METHOD, StoredQuantization
from mixq_compile.errors import OptionError
from mixq_compile.runtime.options import MixqOptions

OPTIONS = (
    "layers", "ignore", "threshold", "capacity", "miss", "stats", "batch_invariant", "force",
)  # fmt: skip
"""Options of MixqOptions that quantizing while loading takes, beside the scheme."""
STORED = "schema_version"
"""A directory's entry has this key, and a user's configuration has not."""


class MixqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantizes a 16- or 32-bit model while transformers loads it, one linear after the other.

        >>> AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=mixq.MixqConfig("w8a8o16"))

    Args:
        scheme: name of the scheme.
        layers: schemes of single linears, by name, part of a name or glob pattern.
        ignore: names, name parts or glob patterns of linears to leave alone.
        threshold: magnitude above which a column stays in 16 bit, or a multiple such as "8x".
        capacity: most outlier columns of one linear, a multiple of 16.
        miss: what a new outlier column does: exact, lazy, frozen, static or per_call.
        stats: calibration statistics, or the path of a file of them.
        batch_invariant: one kernel for every batch size.
        force: also what is not faster; True, since a quantized model is for memory as much.
        stored: what a quantized directory says; not for users.

    Raises OptionError for what is not valid.
    """

    def __init__(
        self,
        scheme: str | None = "w8a8o16",
        *,
        layers: Mapping[str, str] | None = None,
        ignore: Sequence[str] = ("lm_head",),
        threshold: float | str | None = None,
        capacity: int | None = None,
        miss: str | None = None,
        stats: Any = None,
        batch_invariant: bool = False,
        force: bool = True,
        **stored: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        method = stored.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise OptionError(f"a MixqConfig has quant_method {QUANT_METHOD!r}, not {method!r}.")
        self.stored: dict[str, Any] | None = None
        if stored:
            if STORED not in stored:
                valid = ", ".join(("scheme", *OPTIONS))
                raise OptionError(f"MixqConfig takes no option {next(iter(stored))!r}. Valid: {valid}.")
            self.stored = {"quant_method": method, "scheme": scheme, **stored}
            return
        self.scheme = scheme
        self.layers = dict(layers or {})
        self.ignore = tuple(ignore)
        self.threshold, self.capacity, self.miss, self.stats = threshold, capacity, miss, stats
        self.batch_invariant, self.force = batch_invariant, force
        options = self.options()
        options.check_codes_only("quantizing while loading frees")

    def options(self) -> MixqOptions:
        """The options to quantize with. Raises OptionError for what is not valid."""
        given = {name: getattr(self, name) for name in OPTIONS}
        return MixqOptions.from_user(options={"scheme": self.scheme, **given})

    def quantization(self) -> StoredQuantization:
        """What the directory says. Raises CheckpointError where it is not what this release reads."""
        return StoredQuantization.from_json(self.stored or {}, "the quantization_config of config.json")

    @classmethod
    def of(cls, quantization: StoredQuantization) -> MixqConfig:
        """The configuration of a directory."""
        return cls(**quantization.to_json())

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        if self.stored is not None:
            return copy.deepcopy(self.stored)
        return {name: copy.copy(value) for name, value in vars(self).items() if name != "stored"}
