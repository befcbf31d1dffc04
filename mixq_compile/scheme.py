"""What happens to one matmul: number formats, the outlier policy, and the schemes built from them.

Everything here is a frozen value that round-trips through JSON; nothing imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.formats import TensorFormat
from mixq_compile.json_values import finite
from mixq_compile.thresholds import DEFAULT_THRESHOLD, Threshold, checked, multiple_of, read_threshold

SCHEMA_VERSION = 2

MissPolicy = Literal["exact", "lazy", "frozen", "static", "per_call"]
MISS_POLICIES: tuple[str, ...] = get_args(MissPolicy)

ColumnChoice = Literal["above", "largest"]
COLUMN_CHOICES: tuple[str, ...] = get_args(ColumnChoice)

_SOLVERS_FOLDER = Path(__file__).parent / "weights" / "solvers"
SOLVERS: tuple[str, ...] = tuple(
    sorted({module.name for module in pkgutil.iter_modules([str(_SOLVERS_FOLDER)])} - {"registry"})
)
"""Names of the weight solvers: one module each in `mixq_compile.weights.solvers`; none is imported."""

Weighting = Literal["none", "activations"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

_RECIPE = re.compile(
    r"(?P<format>\S+) (?P<solver>\w+)( rank=(?P<rank>[1-9]\d*)( weighting=(?P<weighting>activations))?)?"
    r"(?P<sums> sums)?"
)


@dataclass(frozen=True)
class LowRank:
    """The part of a weight's rounding error that is kept, as two factors of low rank."""

    rank: int
    """Rank of the factors; a linear whose smaller side is below it has that rank."""
    weighting: Weighting = "none"
    """`activations`: errors of a channel count as much as its inputs are large (L2QER)."""

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise OptionError(f"a low-rank part has rank 1 or more, not {self.rank!r}.")
        if self.weighting not in WEIGHTINGS:
            raise unknown_name("low-rank weighting", self.weighting, WEIGHTINGS)


@dataclass(frozen=True)
class WeightRecipe:
    """How the tensors of a weight come about: what a packed weight is known by.

    Its text round-trips: `int4/64 clip`, `uint4/128 absmax rank=8 weighting=activations sums`.
    """

    format: TensorFormat
    solver: str = "absmax"
    """How scales are chosen: from the largest magnitude, or by a search over clipped ones (`clip`)."""
    low_rank: LowRank | None = None
    """The part of the rounding error that is kept beside the codes."""
    sums: bool = False
    """Whether sums of codes are kept, by which products with an activation's zero points are corrected."""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise unknown_name("weight solver", self.solver, SOLVERS)

    def __str__(self) -> str:
        return " ".join(self._words())

    def _words(self) -> Iterator[str]:
        yield str(self.format)
        yield self.solver
        if self.low_rank is not None:
            yield f"rank={self.low_rank.rank}"
            if self.low_rank.weighting != "none":
                yield f"weighting={self.low_rank.weighting}"
        if self.sums:
            yield "sums"

    @classmethod
    def parse(cls, text: str) -> WeightRecipe:
        """The recipe of a text that `str` writes. Raises OptionError for any other."""
        match = _RECIPE.fullmatch(text)
        if match is None:
            raise OptionError(
                f"{text!r} is no recipe of a weight: it is written as a format, a solver and, where there "
                "are any, rank=R, weighting=activations and sums, for example 'uint4/128 absmax rank=8'."
            )
        weighting: Weighting = "none" if match["weighting"] is None else "activations"
        low_rank = None if match["rank"] is None else LowRank(int(match["rank"]), weighting)
        return cls(TensorFormat.parse(match["format"]), match["solver"], low_rank, match["sums"] is not None)

    @property
    def operands(self) -> tuple[str, ...]:
        """The parts of a packed weight, by the names that operators give them."""
        names = ["weight_codes", "weight_scale"]
        names += [] if self.format.signed else ["weight_zero"]
        names += ["weight_sums"] if self.sums else []
        return tuple(names if self.low_rank is None else [*names, "left", "right"])


@dataclass(frozen=True)
class OutlierPolicy:
    """Which columns of an activation stay in 16 bit, how many at most, and what a new one does."""

    threshold: Threshold = DEFAULT_THRESHOLD
    """A column is an outlier column if some element's magnitude is above this: a number (theta), or a
    multiple of the mean magnitude of the element's row, such as `8x`."""
    capacity: int | None = None
    """Most columns kept; a multiple of 16. None: min(128, max(16, K/16 rounded up to 16)), and half as many
    where the threshold is a magnitude."""
    miss: MissPolicy = "exact"
    """What a column above the threshold that is not known yet does; see docs/semantics.md."""
    choose: ColumnChoice = "above"
    """The columns that calibration chooses: all above the threshold, or always as many, the largest first."""

    def __post_init__(self) -> None:
        if self.choose not in COLUMN_CHOICES:
            raise unknown_name("choice of columns", self.choose, COLUMN_CHOICES)
        if self.miss not in MISS_POLICIES:
            raise unknown_name("miss policy", self.miss, MISS_POLICIES)
        checked(self.threshold)
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
        share = 32 if multiple_of(self.threshold) is None else 16
        rounded = math.ceil(in_features / share / 16) * 16
        return min(128, max(16, rounded))

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON-able data; JSON has no infinity, so that a threshold of inf is a text."""
        return {**dataclasses.asdict(self), "threshold": finite(self.threshold)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OutlierPolicy:
        """The policy that `to_json` wrote."""
        return cls(**{**data, "threshold": read_threshold(str(data["threshold"]))})


@dataclass(frozen=True)
class QuantScheme:
    """What happens to one matmul: formats of weight and activation, and the outlier policy."""

    name: str
    summary: str
    weight: TensorFormat
    """The weight's format, solved for once."""
    activation: TensorFormat | None = None
    """The activation's, with scales found anew in every call. None: it stays in 16 bit (weight-only)."""
    outliers: OutlierPolicy | None = None
    """None: no outlier columns are kept."""
    solver: str = "absmax"
    """How the weight's scales are chosen: a name in SOLVERS."""
    low_rank: LowRank | None = None
    """The part of the weight's rounding error that is kept."""
    instead: tuple[tuple[str, str], ...] = field(default=())
    """Roles of linears that this scheme ruins, each with the name of the scheme that they take instead."""
    version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise unknown_name("weight solver", self.solver, SOLVERS)
        if self.low_rank is not None and self.outliers is not None:
            raise OptionError(
                f"scheme {self.name!r} has outlier columns and a low-rank part: that part holds the rounding "
                "errors of all columns, those kept in 16 bit too, which would be added twice. Leave one out."
            )
        affine = self.activation is not None and not self.activation.signed
        if affine and self.weight.scale != "float32":
            raise OptionError(
                f"scheme {self.name!r} quantizes activations with zero points, which products are corrected "
                f"for by fp32 scales of the weight, and {self.weight} has shared exponents: use another one."
            )
        if affine and self.outliers is not None and self.outliers.miss != "static":
            raise OptionError(
                f"scheme {self.name!r} quantizes activations with zero points, which learns no outlier "
                f"columns: its policy must be 'static', not {self.outliers.miss!r}."
            )

    @property
    def recipe(self) -> WeightRecipe:
        """How a weight of this scheme is packed; sums are kept where the activation has zero points."""
        has_zero_points = self.activation is not None and not self.activation.signed
        return WeightRecipe(self.weight, self.solver, self.low_rank, sums=has_zero_points)

    def with_outliers(self, **changes: Any) -> QuantScheme:
        """A copy with fields of the outlier policy replaced; unchanged where there is none."""
        if self.outliers is None:
            return self
        return dataclasses.replace(self, outliers=dataclasses.replace(self.outliers, **changes))

    def to_json(self) -> dict[str, Any]:
        """The scheme as JSON-able data, with its schema version; formats are texts."""
        return {
            "name": self.name,
            "summary": self.summary,
            "weight": str(self.weight),
            "activation": None if self.activation is None else str(self.activation),
            "outliers": None if self.outliers is None else self.outliers.to_json(),
            "solver": self.solver,
            "low_rank": None if self.low_rank is None else dataclasses.asdict(self.low_rank),
            "instead": [list(pair) for pair in self.instead],
            "version": self.version,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> QuantScheme:
        """The scheme that `to_json` wrote, by this release or the first. Raises OptionError for others."""
        version = data.get("version")
        if version not in (1, SCHEMA_VERSION):
            raise OptionError(
                f"scheme {data.get('name')!r} has schema version {version!r}; "
                f"this release reads versions 1 and {SCHEMA_VERSION}. Quantize the model again."
            )
        if version == 1:
            data = _of_the_first_schema(data)
        outliers, low_rank = data["outliers"], data.get("low_rank")  # written since schemes can have one
        activation = None if data["activation"] is None else TensorFormat.parse(data["activation"])
        if outliers is not None and activation is not None and "choose" not in outliers:
            # In older files the activation's bits decided.
            outliers = {**outliers, "choose": "above" if activation.bits == 8 else "largest"}
        return cls(
            name=data["name"],
            summary=data["summary"],
            weight=TensorFormat.parse(data["weight"]),
            activation=activation,
            outliers=None if outliers is None else OutlierPolicy.from_json(outliers),
            solver=data["solver"],
            low_rank=None if low_rank is None else LowRank(**low_rank),
            instead=tuple((role, scheme) for role, scheme in data["instead"]),
        )


def _of_the_first_schema(data: dict[str, Any]) -> dict[str, Any]:
    """The same scheme as `to_json` writes it now: formats were fields, of which kernels read the bits."""
    weight, activation = data["weight"], data["activation"]
    return {
        **data,
        "weight": f"int{weight['bits']}",
        "activation": None if activation is None else f"int{activation['bits']}",
        "solver": weight["solver"],
        "instead": [[role, "w8a8o16"] for role in data["eight_bit_roles"]],
    }
