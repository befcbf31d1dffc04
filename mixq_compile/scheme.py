"""What happens to one matmul: number formats, the outlier policy, and the schemes built from them.

Everything here is a frozen value that round-trips through JSON; nothing imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mixq_compile.errors import OptionError, unknown_name

SCHEMA_VERSION = 1
DEFAULT_THRESHOLD = 6.0

MissPolicy = Literal["exact", "lazy", "frozen", "static", "per_call"]
MISS_POLICIES: tuple[str, ...] = get_args(MissPolicy)

Granularity = Literal["tensor", "channel", "token", "group"]
WeightSolver = Literal["absmax", "clip"]


@dataclass(frozen=True)
class TensorFormat:
    """How the numbers of one tensor are stored."""

    bits: int
    """Bits of one code: 8 or 4."""
    granularity: Granularity
    """What shares one scale: an output `channel`, a `token` (row), a `group` of input channels."""
    symmetric: bool = True
    dynamic: bool = False
    """True where the scale is computed anew in every call."""
    group_size: int | None = None
    solver: WeightSolver = "absmax"
    """How a weight's scale is chosen: its largest magnitude, or a search over clipped ones."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"a TensorFormat has 4 or 8 bits, not {self.bits}.")
        if (self.granularity == "group") != (self.group_size is not None):
            raise OptionError("group_size is given exactly when the granularity is 'group'.")

    @property
    def largest_code(self) -> int:
        """The largest code, `2^(bits-1) - 1`; the smallest is its negative."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class OutlierPolicy:
    """Which columns of an activation stay in 16 bit, how many at most, and what a new one does."""

    threshold: float = DEFAULT_THRESHOLD
    """A column is an outlier column if some element's magnitude is above this (theta)."""
    capacity: int | None = None
    """Most columns kept; a multiple of 16. None: min(128, max(16, K/32 rounded up to 16))."""
    miss: MissPolicy = "exact"
    """What a column above the threshold that is not known yet does; see docs/semantics.md."""

    def __post_init__(self) -> None:
        if self.miss not in MISS_POLICIES:
            raise unknown_name("miss policy", self.miss, MISS_POLICIES)
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise OptionError(f"threshold must be a number, not {self.threshold!r}.")
        if math.isnan(self.threshold) or self.threshold <= 0:
            raise OptionError(
                f"threshold must be above 0, not {self.threshold}: activations whose magnitude "
                "exceeds it are kept in 16 bit. The usual value is 6.0; use scheme 'w8a8' for none."
            )
        if self.capacity is not None and (
            isinstance(self.capacity, bool)
            or not isinstance(self.capacity, int)
            or self.capacity <= 0
            or self.capacity % 16
        ):
            raise OptionError(
                f"capacity must be a positive multiple of 16, not {self.capacity!r}: "
                "outlier columns are multiplied in blocks of 16."
            )

    def capacity_for(self, in_features: int) -> int:
        """The number of outlier slots of a linear with this many input channels (a multiple of 16)."""
        if self.capacity is not None:
            return self.capacity
        rounded = math.ceil(in_features / 32 / 16) * 16
        return min(128, max(16, rounded))

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON-able data; JSON has no infinity, so that a threshold of inf is a text."""
        threshold = "inf" if math.isinf(self.threshold) else self.threshold
        return {**dataclasses.asdict(self), "threshold": threshold}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OutlierPolicy:
        """The policy that `to_json` wrote."""
        return cls(**{**data, "threshold": float(data["threshold"])})


@dataclass(frozen=True)
class QuantScheme:
    """What happens to one matmul: formats of weight and activation, and the outlier policy."""

    name: str
    summary: str
    weight: TensorFormat
    activation: TensorFormat | None = None
    """None: the activation stays in 16 bit (a weight-only scheme)."""
    outliers: OutlierPolicy | None = None
    """None: no outlier columns are kept."""
    eight_bit_roles: tuple[str, ...] = field(default=())
    """Roles of linears that take `w8a8o16` instead, because 4 bits ruin them."""
    version: int = SCHEMA_VERSION

    def with_outliers(self, **changes: Any) -> QuantScheme:
        """A copy with fields of the outlier policy replaced; unchanged where there is none."""
        if self.outliers is None:
            return self
        return dataclasses.replace(self, outliers=dataclasses.replace(self.outliers, **changes))

    def to_json(self) -> dict[str, Any]:
        """The scheme as JSON-able data, with its schema version."""
        outliers = None if self.outliers is None else self.outliers.to_json()
        return {**dataclasses.asdict(self), "outliers": outliers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QuantScheme:
        """The scheme that `to_json` wrote. Raises OptionError for another schema version."""
        if data.get("version") != SCHEMA_VERSION:
            raise OptionError(
                f"scheme {data.get('name')!r} has schema version {data.get('version')!r}; "
                f"this release reads version {SCHEMA_VERSION}. Quantize the model again."
            )
        outliers = data["outliers"]
        return cls(
            name=data["name"],
            summary=data["summary"],
            weight=TensorFormat(**data["weight"]),
            activation=TensorFormat(**data["activation"]) if data["activation"] else None,
            outliers=None if outliers is None else OutlierPolicy.from_json(outliers),
            eight_bit_roles=tuple(data["eight_bit_roles"]),
        )
