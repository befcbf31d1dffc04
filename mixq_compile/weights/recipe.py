"""From a recipe to a weight: the tensors that it has, their bytes, and how they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.errors import OptionError, StatisticsError
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights import low_rank, packing, rounding
from mixq_compile.weights.quantized_weight import QuantizedWeight
from mixq_compile.weights.solvers.registry import get_solver

Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of one tensor."""

MAGNITUDES = "mean_magnitude"
"""The statistics `[K]` by which a low-rank part weighs channels, as calibration names them."""
KEPT = "kept_columns"
"""Columns `[n]` that stay in 16 bit in every call, among the statistics of a joint solver."""
FIXED = ("frozen", "static")
"""The miss policies under which the outlier columns never change."""


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What calibration knows of a linear's input."""

    source: str
    """Which statistics these are: a hash of them."""
    tensors: Mapping[str, Tensor]
    """By the names under which calibration collects them; such as `mean_magnitude` `[K]`."""


def needs(recipe: WeightRecipe) -> tuple[str, ...]:
    """Names of the statistics that `make` takes for a recipe."""
    weighted = recipe.low_rank is not None and recipe.low_rank.weighting == "activations"
    return (*get_solver(recipe.solver).NEEDS, *((MAGNITUDES,) if weighted else ()))


def outliers_from_codes(recipe: WeightRecipe) -> bool:
    """Whether outlier columns come from the codes also where the original weight is at hand.

    They do where columns make up for each other's errors: those of an outlier column are made up for too.
    Columns that the solver was told to keep are neither: they are solved for beside the codes.
    """
    return get_solver(recipe.solver).JOINT


def keeps_columns(recipe: WeightRecipe, miss: str) -> bool:
    """Whether a solver keeps the calibrated columns of such a policy, which then stand beside its codes."""
    return miss in FIXED and get_solver(recipe.solver).JOINT


def parts(recipe: WeightRecipe, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Part]:
    """Shape and dtype of each tensor of a weight `[N, K]`, by operand; low-rank factors have `dtype`.

    Shapes are logical: rows of `weight_codes` are held in multiples of 16 bytes (`empty`, `nbytes`).
    """
    fmt = recipe.format
    codes = fmt.codes_shape(out_features, in_features)
    scales = fmt.scale_shape(out_features, in_features)
    exponents = fmt.scale == "power_of_two"
    found: dict[str, Part] = {
        "weight_codes": (codes, packing.codes_dtype(fmt)),
        "weight_scale": (scales, torch.uint8 if exponents else torch.float32),
    }
    if not fmt.signed:
        found["weight_zero"] = scales, torch.uint8
    if recipe.sums:
        found["weight_sums"] = scales, torch.int32
    if recipe.low_rank is not None:
        rank = min(recipe.low_rank.rank, out_features, in_features)
        found["left"] = (in_features, rank), dtype
        found["right"] = (rank, out_features), dtype
    return found


def nbytes(recipe: WeightRecipe, out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes that a weight `[N, K]` takes in memory, the padding of its rows included."""
    total = 0
    for name, (shape, part_dtype) in parts(recipe, out_features, in_features, dtype).items():
        sizes = (*shape[:-1], packing.padded(shape[-1])) if name == "weight_codes" else shape
        elements = 1
        for size in sizes:
            elements *= size
        total += elements * part_dtype.itemsize
    return total


def packed_bytes(
    recipe: WeightRecipe, out_features: int, in_features: int, dtype: torch.dtype, slots: int
) -> int:
    """Bytes of all that stands for a weight `[N, K]`: its tensors, and outlier columns with their numbers."""
    columns = slots * (out_features * dtype.itemsize + torch.int32.itemsize)
    return nbytes(recipe, out_features, in_features, dtype) + columns


def empty(
    recipe: WeightRecipe,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> QuantizedWeight:
    """The tensors of a weight `[N, K]`, uninitialised, laid out in memory as `make` lays them."""
    where = torch.device(device)
    named = {
        name: packing.aligned_empty(shape[:-1], shape[-1], part_dtype, where)
        if name == "weight_codes"
        else torch.empty(shape, dtype=part_dtype, device=where)
        for name, (shape, part_dtype) in parts(recipe, out_features, in_features, dtype).items()
    }
    return QuantizedWeight.from_named(named)


def make(
    recipe: WeightRecipe,
    matrix: Tensor,
    dtype: torch.dtype,
    inputs: Mapping[str, Tensor] | None = None,
) -> QuantizedWeight:
    """The weight `[N, K]` (of any floating dtype and strides) as its recipe has it, on the same device.

    Args:
        recipe: format, solver and what else there is.
        matrix: the weight, one row an output.
        dtype: of low-rank factors.
        inputs: statistics of the linear's input, by the names under which calibration collects them.

    Raises StatisticsError where the recipe needs statistics that `inputs` lacks or that do not fit, and
    MixqError where NaN or infinity in the weight cannot be kept.
    """
    solver = get_solver(recipe.solver)
    given = inputs or {}
    wanted = {name: _statistics(recipe, name, given) for name in solver.NEEDS}
    weights = _channel_weights(recipe, matrix.shape[1], given)
    values = matrix.detach().float()
    fmt = recipe.format
    if solver.JOINT and KEPT in given:
        wanted[KEPT] = given[KEPT]
    codes, scale, zero, kept = solver.solve(values, fmt, wanted)
    sums = rounding.code_sums(codes, zero, fmt) if recipe.sums else None
    left = right = None
    if recipe.low_rank is not None:
        error = (values - rounding.values(codes, scale, zero, fmt)).T
        factors = low_rank.factors(error, recipe.low_rank.rank, weights)
        left, right = (factor.to(dtype).contiguous() for factor in factors)
    return QuantizedWeight(packing.pack(codes, fmt), scale, zero, sums, left, right, kept)


def refuse_beyond_codes(recipe: WeightRecipe, what: str) -> None:
    """Raises OptionError where a recipe has more than codes and scales, with `what` cannot take it."""
    extra = [name for name in ("low_rank", "sums") if getattr(recipe, name)]
    if extra:
        raise OptionError(f"{what} takes codes and scales alone, not {', '.join(extra)} of {str(recipe)!r}.")


def _statistics(recipe: WeightRecipe, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    if name not in inputs:
        raise StatisticsError(
            f"a weight of {str(recipe)!r} needs the {name} of its linear's inputs, which was not given: "
            "calibrate the model first (mixq calibrate), and pass its statistics."
        )
    return inputs[name]


def _channel_weights(recipe: WeightRecipe, in_features: int, inputs: Mapping[str, Tensor]) -> Tensor | None:
    if recipe.low_rank is None or recipe.low_rank.weighting == "none":
        return None
    magnitudes = _statistics(recipe, MAGNITUDES, inputs)
    if tuple(magnitudes.shape) != (in_features,) or not bool(torch.isfinite(magnitudes).all()):
        raise StatisticsError(
            f"the {MAGNITUDES} of a linear's inputs must be {in_features} finite numbers, one a channel, and "
            f"has the shape {list(magnitudes.shape)}: calibrate this model again."
        )
    return low_rank.channel_weights(magnitudes)
