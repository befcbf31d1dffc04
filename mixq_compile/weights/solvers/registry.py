"""The solvers by name: every module of this folder but this one is a solver."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol, cast

from torch import Tensor

from mixq_compile.errors import unknown_name
from mixq_compile.formats import TensorFormat
from mixq_compile.scheme import SOLVERS

_PACKAGE = __name__.rpartition(".")[0]


class Solution(NamedTuple):
    """What a solver finds for a weight `[N, K]`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    """As `rounding.rounded` returns them."""
    kept: Tensor | None = None
    """[N, n]: the columns that stay in 16 bit, as they make up for the others; None where none was named."""


class Solver(Protocol):
    """A module that solves for the codes of a weight."""

    NEEDS: tuple[str, ...]
    """Statistics of the inputs that it is given, by the names under which calibration collects them."""
    JOINT: bool
    """Whether columns make up for each other's errors: one taken from the original weight would then be made
    up for without need, so that outlier columns come from the codes."""

    def solve(self, matrix: Tensor, fmt: TensorFormat, inputs: Mapping[str, Tensor]) -> Solution:
        """Codes, scales and zero points of a weight `[N, K]` in fp32.

        `inputs` has the statistics in `NEEDS` and no others, but that joint solvers are told
        `kept_columns` `[n]` where columns stay in 16 bit in every call.
        """
        ...


def get_solver(name: str) -> Solver:
    """The solver of this name. Raises OptionError that lists the valid names."""
    if name not in SOLVERS:
        raise unknown_name("weight solver", name, SOLVERS)
    return cast(Solver, importlib.import_module(f"{_PACKAGE}.{name}"))
