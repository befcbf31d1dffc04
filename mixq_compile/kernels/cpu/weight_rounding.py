"""The codes and scales of a weight's rows in one pass, with the bits that `weights.rounding` gives."""

from __future__ import annotations

import math
from ctypes import byref

import torch
from torch import Tensor

from mixq_compile.kernels.cpu.availability import DTYPES, reason_unavailable
from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import CPU, WeightRoundingArguments, type_number
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights.packing import codes_dtype


def serves(recipe: WeightRecipe, dtype: torch.dtype) -> bool:
    """True where `round_rows` makes the weights of a recipe: int8 and int4 with one scale a row, `absmax`."""
    fmt = recipe.format
    plain = fmt.per_row and fmt.bits in (4, 8) and recipe.solver == "absmax"
    return plain and recipe.operands == ("weight_codes", "weight_scale") and dtype in DTYPES and _available()


def _available() -> bool:
    return reason_unavailable() is None


def round_rows(rows: Tensor, recipe: WeightRecipe, threads: int = 1) -> tuple[Tensor, Tensor] | None:
    """Codes `[N, ceil(K * bits / 8)]`, without padding, and scales `[N]` of contiguous rows `[N, K]`.

    One thread by default: beside reading and writing, more would wait for each other. None where a value is
    not finite: only the specification says what becomes of it.
    """
    count, columns = rows.shape
    width = math.ceil(columns * recipe.format.bits / 8)
    codes = torch.empty((count, width), dtype=codes_dtype(recipe.format), device=CPU)
    scale = torch.empty(count, dtype=torch.float32, device=CPU)
    arguments = WeightRoundingArguments(
        rows.data_ptr(), codes.data_ptr(), scale.data_ptr(), count, columns, rows.stride(0), width,
        type_number(rows.dtype), recipe.format.bits, threads,
    )  # fmt: skip
    return None if library().mixq_round_weight(byref(arguments)) else (codes, scale)
