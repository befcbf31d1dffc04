"""The solvers by name: every module of this folder but this one is a solver."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

from torch import Tensor

from mixq_compile.errors import unknown_name
from mixq_compile.formats import TensorFormat
from mixq_compile.scheme import SOLVERS

_PACKAGE = __name__.rpartition(".")[0]


class Solver(Protocol):
    """A module that solves for the codes of a weight."""

    NEEDS: tuple[str, ...]
    """Statistics of the inputs that it is given, by the names under which calibration collects them."""
    JOINT: bool
    """Whether columns make up for each other's errors: one taken from the original weight would then be made
    up for without need, so that outlier columns come from the codes."""

    def solve(
        self, matrix: Tensor, fmt: TensorFormat, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points of a weight `[N, K]` in fp32, as `rounding.rounded` returns them.

        `inputs` has the statistics in `NEEDS` and no others.
        """
        ...


def get_solver(name: str) -> Solver:
    """The solver of this name. Raises OptionError that lists the valid names."""
    if name not in SOLVERS:
        raise unknown_name("weight solver", name, SOLVERS)
    return cast(Solver, importlib.import_module(f"{_PACKAGE}.{name}"))
