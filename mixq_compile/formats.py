"""Number formats as values with a text: `int8`, `int4`, `int4/128`, `uint4/128`, `mxint4/16`.

A format says how the numbers of one matrix are stored, and is the only place that knows how many bytes that
takes. What a format's numbers mean is `weights/rounding.py`; who can compute with them, the kernels' say.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

from mixq_compile.errors import OptionError

BITS = (2, 4, 8)
_TEXT = re.compile(r"(?P<kind>int|uint|mxint)(?P<bits>\d+)(/(?P<group>\d+))?")
_EXAMPLES = "int8, int4, int4/128 (groups of 128), uint4/128 (with zero points), mxint4/16 (shared exponents)"

ScaleKind = Literal["float32", "power_of_two"]


@dataclass(frozen=True)
class TensorFormat:
    """How the numbers of a matrix `[N, K]` are stored: integers of few bits, scaled along K."""

    bits: int
    """Bits of one code: 2, 4 or 8. Codes narrower than a byte lie several in one, the first column lowest."""
    group: int | None = None
    """How many columns share a scale; None: all of a row."""
    signed: bool = True
    """False: codes count from 0, and each scale has a zero point."""
    scale: ScaleKind = "float32"
    """`power_of_two`: a shared exponent, as in the MX formats; those are signed and in groups."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError(f"a format has 2, 4 or 8 bits, not {self.bits!r}. Formats: {_EXAMPLES}.")
        if self.group is not None and (isinstance(self.group, bool) or self.group < 1):
            raise OptionError(
                f"a format's groups have 1 column or more, not {self.group!r}. Formats: {_EXAMPLES}."
            )
        if self.scale == "power_of_two" and (self.group is None or not self.signed):
            raise OptionError(
                f"a format with shared exponents is signed and in groups. Formats: {_EXAMPLES}."
            )

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> TensorFormat:
        """The format of a text that `str` writes. Raises OptionError for one that is none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise OptionError(f"{text!r} is no number format. Formats: {_EXAMPLES}.")
        return TensorFormat(
            bits=int(match["bits"]),
            group=int(match["group"]) if match["group"] else None,
            signed=match["kind"] != "uint",
            scale="power_of_two" if match["kind"] == "mxint" else "float32",
        )

    def __str__(self) -> str:
        kind = "mxint" if self.scale == "power_of_two" else "int" if self.signed else "uint"
        return f"{kind}{self.bits}" + ("" if self.group is None else f"/{self.group}")

    @property
    def largest_code(self) -> int:
        """The largest code: `2^(bits-1) - 1`, without a sign `2^bits - 1`."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def lowest_code(self) -> int:
        """The lowest code: 0 without a sign; `-2^(bits-1)`, but as far as the largest in int8 and mxint."""
        if not self.signed:
            return 0
        return -self.largest_code - (self.bits < 8 and self.scale == "float32")

    @property
    def per_row(self) -> bool:
        """True where a row has one scale and no zero point: what the integer kernels multiply."""
        return self.group is None and self.signed and self.scale == "float32"

    def groups(self, in_features: int) -> int:
        """How many scales a row of K = `in_features` columns has."""
        return 1 if self.group is None else math.ceil(in_features / self.group)

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The shape of the codes of a matrix `[N, K]`: `[N, ceil(K * bits / 8)]` bytes."""
        return out_features, math.ceil(in_features * self.bits / 8)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The shape of its scales, and of its zero points: `[N]`, in groups `[N, G]`."""
        return (out_features,) if self.group is None else (out_features, self.groups(in_features))

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes, scales (fp32, or one byte of exponent) and zero points (one byte) of `[N, K]`."""
        rows, row_bytes = self.codes_shape(out_features, in_features)
        scales = rows * self.groups(in_features)
        return (
            rows * row_bytes
            + scales * (1 if self.scale == "power_of_two" else 4)
            + scales * (not self.signed)
        )


INT8 = TensorFormat(8)
INT4 = TensorFormat(4)
