"""What the `quantization_config` of a quantized directory says, as values that round-trip through JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mixq_compile.checkpoints.safetensors_files import NAMES
from mixq_compile.errors import CheckpointError, MixqError
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights import recipe as recipes

SCHEMA_VERSION = 3
OLDER = (1, 2)
"""Those were written in a file `mixq.json`."""
QUANT_METHOD = "mixq"
TRIPWIRE = "weight"
"""Under this name of each quantized linear lies NaN of shape [1]: whoever reads the directory as that of an
ordinary model meets a wrong shape, in place of a linear that stays random."""
COLUMNS, MAXIMA, OUTLIER_WEIGHT = "outlier_columns", "outlier_maxima", "outlier_weight"
CALIBRATED_COLUMNS, CALIBRATED_MAXIMA = "calibrated_columns", "calibrated_maxima"
ORIGINAL = "outlier_source"
OF_OUTLIERS = (COLUMNS, MAXIMA, OUTLIER_WEIGHT, CALIBRATED_COLUMNS, CALIBRATED_MAXIMA)
"""What a linear's outlier state is made from when it is loaded."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""dtype, as headers name it, and shape by a tensor's name in its linear."""


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear of a directory."""

    scheme: QuantScheme
    out_features: int
    in_features: int
    bias: bool
    dtype: str
    """Of outlier columns, bias and low-rank factors, such as `bfloat16`."""
    batch_invariant: bool = False
    columns: int = 0
    """How many outlier columns it has; it holds their 16-bit weights."""
    calibrated: int = 0
    """How many columns a reset goes back to."""
    original: bool = False
    """Whether the whole 16-bit weight is kept, as the source of columns found online."""
    transposed: bool = False
    """Whether it stands for a transformers `Conv1D`, whose weight is [K, N]."""
    state: Mapping[str, float] = field(default_factory=dict)
    """What of the outlier state differs from that of a new one with these columns."""

    @property
    def recipe(self) -> str:
        """The text that says what the linear computes."""
        return str(LinearRecipe.of(self.scheme, self.batch_invariant))

    def tensors(self) -> Shapes:
        """The tensors that the directory holds of it, under the linear's name."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        found: Shapes = {
            name: (NAMES[kind], tuple(shape))
            for name, (shape, kind) in recipes.parts(
                self.scheme.recipe, self.out_features, self.in_features, dtype
            ).items()
        }
        found[TRIPWIRE] = "F32", (1,)
        if self.bias:
            found["bias"] = NAMES[dtype], (self.out_features,)
        if self.columns:
            found[COLUMNS] = "I32", (self.columns,)
            found[MAXIMA] = "F32", (self.columns,)
            found[OUTLIER_WEIGHT] = NAMES[dtype], (self.out_features, self.columns)
        if self.calibrated:
            found[CALIBRATED_COLUMNS] = "I32", (self.calibrated,)
            found[CALIBRATED_MAXIMA] = "F32", (self.calibrated,)
        if self.original:
            found[ORIGINAL] = NAMES[dtype], (self.out_features, self.in_features)
        return found

    def to_json(self, scheme: str) -> dict[str, Any]:
        """The entry of the linear; `scheme` is what the directory calls its scheme."""
        optional = {
            name: getattr(self, name)
            for name in ("bias", "batch_invariant", "columns", "calibrated", "original", "transposed")
        }
        entry = {
            "scheme": scheme,
            "recipe": self.recipe,
            "shape": [self.out_features, self.in_features],
            "dtype": self.dtype,
            **{name: value for name, value in optional.items() if value},
        }
        return {**entry, "state": dict(self.state)} if self.state else entry

    @classmethod
    def from_json(cls, data: Mapping[str, Any], schemes: Mapping[str, QuantScheme]) -> StoredLinear:
        """The linear of an entry. Raises ValueError, KeyError or TypeError for one that is none."""
        out_features, in_features = (_whole(size, 1) for size in data["shape"])
        if data["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {data['dtype']!r} is none of float32, bfloat16 and float16")
        found = cls(
            schemes[data["scheme"]],
            out_features,
            in_features,
            bool(data.get("bias", False)),
            data["dtype"],
            bool(data.get("batch_invariant", False)),
            _whole(data.get("columns", 0)),
            _whole(data.get("calibrated", 0)),
            bool(data.get("original", False)),
            bool(data.get("transposed", False)),
            {str(name): float(value) for name, value in data.get("state", {}).items()},
        )
        if found.recipe != data["recipe"]:
            raise ValueError(f"its recipe is {data['recipe']!r}, and its scheme's {found.recipe!r}")
        policy = found.scheme.outliers
        capacity = policy.capacity_for(in_features) if policy is not None else 0
        if max(found.columns, found.calibrated) > capacity:
            raise ValueError(f"it has {found.columns} outlier columns and room for {capacity}")
        return found


def _whole(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r} is no number from {least} on")
    return value


@dataclass(frozen=True)
class LeftAlone:
    """One linear, or weight of experts, that was not quantized."""

    role: str
    out_features: int
    in_features: int
    skip: str
    float_bytes: int


@dataclass(frozen=True)
class StoredQuantization:
    """What a directory says of its quantization."""

    linears: Mapping[str, StoredLinear]
    left_alone: Mapping[str, LeftAlone] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    """What its statistics were collected from: a hash of them, how much text; None where there were none."""
    dtype: str = "float32"
    """The model's dtype."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Tensors of another dtype than the model's, and computed ones, which no file holds."""
    tensors: Mapping[str, Any] = field(default_factory=dict)
    """`count` and `digest` of names, dtypes and shapes in all files."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The SHA-256 of each file."""

    def to_json(self) -> dict[str, Any]:
        """What `quantization_config` holds."""
        schemes: dict[str, QuantScheme] = {}
        names = {name: _called(linear.scheme, schemes) for name, linear in self.linears.items()}
        usual = Counter(names.values()).most_common(1)
        return {
            "quant_method": QUANT_METHOD,
            "schema_version": SCHEMA_VERSION,
            "scheme": usual[0][0] if usual else None,
            "schemes": {name: scheme.to_json() for name, scheme in schemes.items()},
            "modules": {name: linear.to_json(names[name]) for name, linear in self.linears.items()},
            "modules_to_not_convert": {name: vars(entry) for name, entry in self.left_alone.items()},
            "calibration": self.calibration,
            "dtype": self.dtype,
            "dtypes": dict(self.dtypes),
            "tensors": dict(self.tensors),
            "files": dict(self.files),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> StoredQuantization:
        """The quantization that `to_json` wrote.

        Raises CheckpointError, with `where` it was read, for another method, a newer schema and a corrupt
        one.
        """
        method = data.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"{where} has quant_method {method!r}, not {QUANT_METHOD!r}: it was quantized by another "
                "library, whose own loader reads it."
            )
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            todo = "install a newer mixq-compile." if newer else "quantize the model again."
            if version in OLDER:
                todo = "load it with mixq_compile.load_pretrained, and save it again for other readers."
            raise CheckpointError(
                f"{where} has schema version {version!r}, and this release reads {SCHEMA_VERSION}: {todo}"
            )
        try:
            schemes = {name: QuantScheme.from_json(entry) for name, entry in data["schemes"].items()}
            linears = {
                name: _named(name, lambda entry=entry: StoredLinear.from_json(entry, schemes))
                for name, entry in data["modules"].items()
            }
            left_alone = {name: LeftAlone(**entry) for name, entry in data["modules_to_not_convert"].items()}
            tensors = {"count": _whole(data["tensors"]["count"]), "digest": str(data["tensors"]["digest"])}
            for name in (*linears, *data["files"]):
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{name!r} is no name")
            dtypes = {name: str(dtype) for name, dtype in data["dtypes"].items()}
            for dtype in (data["dtype"], *dtypes.values()):
                if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
                    raise ValueError(f"{dtype!r} is no dtype")
            return cls(
                linears, left_alone, data["calibration"], data["dtype"], dtypes, tensors,
                {name: str(value) for name, value in data["files"].items()},
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MixqError) as error:
            raise CheckpointError(
                f"{where} is corrupt ({type(error).__name__}: {error}): quantize the model again."
            ) from error


def _named(name: str, read: Any) -> StoredLinear:
    try:
        found: StoredLinear = read()
    except KeyError as error:
        raise ValueError(f"module {name!r} lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"module {name!r}: {error}") from error
    return found


def _called(scheme: QuantScheme, known: dict[str, QuantScheme]) -> str:
    """The name of a scheme among those known; the same scheme with other options has another one."""
    for name in _candidates(scheme.name):
        if known.setdefault(name, scheme) == scheme:
            return name
    raise AssertionError("names are endless")


def _candidates(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name} ({number})"
        number += 1
