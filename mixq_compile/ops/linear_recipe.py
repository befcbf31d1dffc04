"""What a whole quantized linear computes, as a text: the last operand of `mixq::linear`.

It says which tensors the operator's lists hold, so that a serialised program stays readable when schemes
with more parts come. Read once for each text, never in a hot path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import OperandError, OptionError
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.outlier_state import STATE_FIELDS
from mixq_compile.scheme import MissPolicy, OutlierPolicy, QuantScheme, WeightRecipe
from mixq_compile.thresholds import Threshold, read_threshold

CACHE_FIELDS = ("cached_index", "outlier_weight")
"""What a linear keeps of its outlier columns: which they are `[C]`, and their weights `[N, C]`."""
ORIGINAL = "original"
"""The 16-bit weight `[N, K]`, or an empty tensor: the last of a linear's weight tensors."""
_STATIC: MissPolicy = "static"
_NONE = "none"


@dataclass(frozen=True)
class LinearRecipe:
    """Formats, parts and policy of one quantized linear.

    The text is such as `weight=int8 absmax; activation=int8; outliers=exact 8x; batch_invariant`. A text,
    because operators take no dataclasses, and because Dynamo makes a graph input of a float where shapes are
    dynamic. Passes compare the threshold; the one in force is in the state.
    """

    weight: WeightRecipe
    activation: TensorFormat | None
    """None: x stays in 16 or 32 bit."""
    miss: str = _STATIC
    threshold: Threshold = math.inf
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.weight.sums and self.weight.format.scale != "float32":
            raise OptionError(
                f"zero points of an activation are corrected for by fp32 scales of the weight, and "
                f"{self.weight.format} has shared exponents: use another format."
            )

    @classmethod
    def of(cls, scheme: QuantScheme, batch_invariant: bool) -> LinearRecipe:
        """The recipe of a scheme's linears."""
        policy = scheme.outliers or OutlierPolicy(threshold=math.inf, miss=_STATIC)
        return cls(scheme.recipe, scheme.activation, policy.miss, policy.threshold, batch_invariant)

    def __str__(self) -> str:
        parts = [f"weight={self.weight}", f"activation={self.activation or _NONE}"]
        parts.append(f"outliers={self.miss} {self.threshold}")
        return "; ".join([*parts, "batch_invariant"] if self.batch_invariant else parts)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> LinearRecipe:
        """The recipe of a text that `str` writes. Raises OptionError for one that is none."""
        parts = [part.strip().partition("=") for part in text.split(";")]
        named = {name: value for name, _, value in parts}
        if set(named) - {"batch_invariant"} != {"weight", "activation", "outliers"}:
            raise OptionError(f"{text!r} is no recipe of a linear: it is written such as {_EXAMPLE!r}.")
        miss, _, threshold = named["outliers"].partition(" ")
        try:
            limit = read_threshold(threshold)
        except OptionError as error:
            raise OptionError(f"{text!r}: {error}") from None
        return LinearRecipe(
            weight=WeightRecipe.parse(named["weight"]),
            activation=None if named["activation"] == _NONE else TensorFormat.parse(named["activation"]),
            miss=OutlierPolicy(threshold=limit, miss=miss).miss,  # type: ignore[arg-type]
            threshold=limit,
            batch_invariant="batch_invariant" in named,
        )

    @property
    def weight_operands(self) -> tuple[str, ...]:
        """What the operator's list `weight` holds, in this order."""
        return (*self.weight.operands, ORIGINAL)

    def named(self, weight: Sequence[Any], state: Sequence[Any], cache: Sequence[Any]) -> dict[str, Any]:
        """The tensors, or nodes, of the operator's lists by name. Raises OperandError for another number."""
        found: dict[str, Any] = {}
        for kind, names, given in (
            ("weight", self.weight_operands, weight),
            ("state", STATE_FIELDS, state),
            ("cache", CACHE_FIELDS, cache),
        ):
            if len(names) != len(given):
                raise OperandError(
                    f"mixq::linear: {kind} has {len(given)} tensors, and the recipe {str(self)!r} takes "
                    f"{len(names)}: {', '.join(names)}."
                )
            found.update(zip(names, given, strict=True))
        return found


_EXAMPLE = "weight=int8 absmax; activation=int8; outliers=exact 8x"
