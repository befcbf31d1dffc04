"""What an estimate takes for granted: every report carries it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from mixq_compile.area.checks import whole_number
from mixq_compile.errors import OptionError, unknown_name

Technology = Literal["nand2", "lut6", "um2-45nm"]
TECHNOLOGIES: tuple[str, ...] = get_args(Technology)
UNIT_OF: dict[str, str] = {"nand2": "NAND2 equivalents", "lut6": "6-input LUTs", "um2-45nm": "µm² at 45 nm"}

Folding = Literal["none", "rate-matched"]
FOLDINGS: tuple[str, ...] = get_args(Folding)

Accumulators = Literal["exact", "fixed"]
FloatAccumulator = Literal["fp16", "fp32"]
Groups = Literal["outputs", "inputs"]
LONGEST_ACCUMULATOR = 64


@dataclass(frozen=True)
class Assumptions:
    """How a linear is laid out as a circuit, and what is counted.

    With fixed lanes the area of a circuit does not depend on the number of rows or output features, its
    cycles do.
    """

    lanes_k: int = 16
    """Elements of the dot product that are multiplied in one cycle; also the block size of MXINT."""
    lanes_n: int = 1
    """Output features computed side by side."""
    lanes_m: int = 1
    """Rows computed side by side."""
    initiation_interval: int = 1
    """Cycles between two starts of the dot product."""
    clock_ns: float = 10.0
    """Time of one cycle in nanoseconds; slow enough for every unit without pipeline registers."""
    technology: Technology = "nand2"
    """What area is counted in: NAND2 equivalents, 6-input LUTs, or µm² at 45 nm."""
    folding: Folding = "none"
    """`none`: stages beside the main dot product are as wide as it. `rate-matched`: such a stage has
    ceil(its work / cycles of the main dot product) lanes."""
    accumulators: Accumulators = "exact"
    """Of integer dot products. `exact`: as wide as the largest possible sum. `fixed`: `accumulator_bits`."""
    accumulator_bits: int = 32
    """Width of integer accumulators where they are fixed."""
    exact_depth: int | None = None
    """Number of products that exact accumulators hold; None: as many as the dot product has."""
    float_accumulator: FloatAccumulator = "fp16"
    """Format in which dot products of FP16 are accumulated."""
    casts_weight: bool = True
    """LLM.int8 and LLM.int4 quantize W while they run. False: codes are stored, as bitsandbytes does."""
    zero_point: bool = True
    """AWQ and GPTQ subtract a zero point from their codes."""
    groups: Groups = "outputs"
    """What the groups of AWQ and GPTQ divide: the `outputs` (num_groups scalars for the columns of W), or
    the `inputs` (num_groups scalars for each column of W, as groups of 128 have it)."""

    dsp_blocks: ClassVar[str] = "none: multipliers are made of LUTs"
    excluded: ClassVar[tuple[str, ...]] = ("memory", "routing", "control")

    def __post_init__(self) -> None:
        for name in ("lanes_k", "lanes_n", "lanes_m", "initiation_interval"):
            whole_number(f"assumptions.{name}", getattr(self, name), least=1)
        whole_number("assumptions.accumulator_bits", self.accumulator_bits, least=8, most=LONGEST_ACCUMULATOR)
        if self.exact_depth is not None:
            whole_number("assumptions.exact_depth", self.exact_depth, least=1)
        for name, kind in (
            ("technology", Technology),
            ("folding", Folding),
            ("accumulators", Accumulators),
            ("float_accumulator", FloatAccumulator),
            ("groups", Groups),
        ):
            if getattr(self, name) not in get_args(kind):
                raise unknown_name(f"assumptions.{name}", getattr(self, name), get_args(kind))
        for name in ("casts_weight", "zero_point"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"assumptions.{name} must be True or False, not {getattr(self, name)!r}.")
        clock = self.clock_ns
        if isinstance(clock, bool) or not isinstance(clock, (int, float)) or not 0 < clock < math.inf:
            raise OptionError(f"assumptions.clock_ns must be a number of nanoseconds above 0, not {clock!r}.")

    @property
    def unit(self) -> str:
        """What area is counted in, in words."""
        return UNIT_OF[self.technology]

    @property
    def dots(self) -> int:
        """Dot products that are computed side by side."""
        return self.lanes_n * self.lanes_m

    def to_json(self) -> dict[str, Any]:
        """Everything assumed, with what is left out, as JSON-able data."""
        return {
            **dataclasses.asdict(self),
            "dsp_blocks": self.dsp_blocks,
            "excluded": list(self.excluded),
        }


DEFAULT = Assumptions()
"""What is assumed unless something else is given."""
