"""Errors of each linear by itself: measured for mixq's schemes, simulated for the number formats of others.

The formats are simulated, not the calibration: weights are rounded to nearest, where AWQ searches scales and
clips, GPTQ and QUIK feed errors back, and Atom clips. Their published errors are smaller than these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixq_compile.area.linear_areas import ATOM_COLUMNS, QUIK_COLUMNS, LinearSize
from mixq_compile.benchmarking.layer_errors import layer_errors
from mixq_compile.cli.output import step
from mixq_compile.evaluation import sqnr
from mixq_compile.inspection.layers import calibrated_columns
from mixq_compile.scheme import DEFAULT_THRESHOLD
from mixq_compile.schemes.registry import get_scheme

if TYPE_CHECKING:
    from mixq_compile.cli.capturing import Captured
    from mixq_compile.pipeline.history import History

OWN_SCHEMES = ("w8a8", "w8a8o16", "w4a8o16", "w4a4o16")
"""Schemes that this package runs, so that their error is measured."""
FINDS_COLUMNS = "w8a8o16"
"""The scheme that is run to count outlier columns."""
BLOCK = 16
"""Numbers of one MXINT block, as many as lanes by default."""
SMALLEST = 1e-8
SMOOTHING = 0.5
"""SmoothQuant's migration strength."""
POWER_ITERATIONS = 4
LEAST_ACTIVATION = 1e-4


@dataclass(frozen=True)
class Measured:
    """What runs of a model found."""

    sqnr_db: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By scheme and layer."""
    columns: Mapping[str, int] = field(default_factory=dict)
    """Outlier columns by layer."""


@dataclass(frozen=True)
class Problem:
    """One linear on the inputs that the model feeds it, in fp32."""

    x: Tensor
    """(rows, in)."""
    w: Tensor
    """(out, in)."""
    size: LinearSize
    threshold: float

    @property
    def outliers(self) -> Tensor:
        """Which columns of X have a magnitude above the threshold."""
        return self.x.abs().amax(0) >= self.threshold

    def largest_columns(self, count: int) -> Tensor:
        """Which columns of X have the largest magnitudes."""
        chosen = torch.zeros(self.x.shape[1], dtype=torch.bool, device=self.x.device)
        chosen[self.x.abs().amax(0).topk(min(count, len(chosen))).indices] = True
        return chosen


def fixed_point(values: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Rounded to signed integers of `bits` bits with one scale for each row, or each group of a row."""
    grouped = values.reshape(*values.shape[:-1], -1, group or values.shape[-1])
    largest = 2 ** (bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / largest
    rounded: Tensor = (grouped / scale).round().clamp(-largest, largest) * scale
    return rounded.reshape(values.shape)


def with_zero_point(values: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Rounded to unsigned integers between the smallest and the largest value of each row or group."""
    grouped = values.reshape(*values.shape[:-1], -1, group or values.shape[-1])
    low = grouped.amin(-1, keepdim=True).clamp_max(0)
    high = grouped.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(SMALLEST) / (2**bits - 1)
    zero = (-low / scale).round()
    codes = ((grouped / scale).round() + zero).clamp(0, 2**bits - 1)
    rounded: Tensor = (codes - zero) * scale
    return rounded.reshape(values.shape)


def mxint(values: Tensor, bits: int) -> Tensor:
    """Rounded to sign and bits - 1 bits of magnitude, with a power of two for each block of a row."""
    length = values.shape[-1]
    padded = nn.functional.pad(values, (0, -length % BLOCK))
    blocks = padded.reshape(*values.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-127)
    step = torch.exp2(largest.log2().ceil() - (bits - 1))
    most = 2 ** (bits - 1) - 1
    return ((blocks / step).round().clamp(-most, most) * step).reshape(padded.shape)[..., :length]


def _split(problem: Problem, kept: Tensor, low: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The product of the columns that are kept exactly, and of the others through `low`."""
    inside = torch.where(kept, 0.0, problem.x), torch.where(kept, 0.0, problem.w)
    return low(*inside) + torch.where(kept, problem.x, 0.0) @ problem.w.T


def _llm_int(problem: Problem, bits: int) -> Tensor:
    return _split(problem, problem.outliers, lambda x, w: fixed_point(x, bits) @ fixed_point(w, bits).T)


def _quik(problem: Problem) -> Tensor:
    kept = problem.largest_columns(QUIK_COLUMNS)
    return _split(problem, kept, lambda x, w: with_zero_point(x, 4) @ fixed_point(w, 4).T)


def _atom(problem: Problem) -> Tensor:
    kept, group = problem.largest_columns(ATOM_COLUMNS), problem.size.group
    x, w = problem.x, problem.w
    low = [fixed_point(torch.where(kept, 0.0, values), 4, group) for values in (x, w)]
    high = [fixed_point(torch.where(kept, values, 0.0), 8) for values in (x, w)]
    return low[0] @ low[1].T + high[0] @ high[1].T


def _smoothquant(problem: Problem) -> Tensor:
    reach_x, reach_w = (values.abs().amax(0).clamp_min(SMALLEST) for values in (problem.x, problem.w))
    scale = reach_x**SMOOTHING / reach_w ** (1 - SMOOTHING)
    return fixed_point(problem.x / scale, 8) @ fixed_point(problem.w * scale, 8).T


def _weight_only(problem: Problem) -> Tensor:
    return problem.x.half().float() @ with_zero_point(problem.w, 4, problem.size.group).T


def _low_rank(problem: Problem, low: Callable[[Tensor], Tensor], high: Callable[[Tensor], Tensor]) -> Tensor:
    """L2QER: the error of W, weighted by the mean magnitudes of X, to low rank."""
    weights = low(problem.w)
    reach = problem.x.abs().mean(0).clamp_min(LEAST_ACTIVATION)
    scale = reach / (reach.min() * reach.max()).sqrt()
    error = (problem.w - weights).T * scale[:, None]
    rank = min(problem.size.rank, *error.shape)
    left, singular, right = torch.svd_lowrank(error, q=rank, niter=POWER_ITERATIONS)
    # Blocks and scales lie along the dimension that is summed over: in for A, the rank for B.
    a, b = high((left / scale[:, None]).T).T, high((singular[:, None] * right.T).T).T
    x = high(problem.x)
    return x @ weights.T + high(x @ a) @ b


SIMULATED: dict[str, Callable[[Problem], Tensor]] = {
    "fp16": lambda problem: (problem.x.half().float() @ problem.w.half().float().T).half().float(),
    "smoothquant": _smoothquant,
    "llm_int8": lambda problem: _llm_int(problem, 8),
    "llm_int4": lambda problem: _llm_int(problem, 4),
    "quik": _quik,
    "atom": _atom,
    "awq": _weight_only,
    "gptq": _weight_only,
    "lqer_int8": lambda problem: _low_rank(
        problem, lambda w: fixed_point(w, 8), lambda values: fixed_point(values, 16)
    ),
    "lqer_int4": lambda problem: _low_rank(
        problem, lambda w: fixed_point(w, 4), lambda values: fixed_point(values, 16)
    ),
    "lqer_mxint4": lambda problem: _low_rank(problem, lambda w: mxint(w, 4), lambda values: mxint(values, 8)),
    "lqer_mxint2": lambda problem: _low_rank(problem, lambda w: mxint(w, 2), lambda values: mxint(values, 8)),
}
"""The product of a linear as each scheme rounds it."""


def measured_errors(
    captured: Captured,
    history: History,
    schemes: Sequence[str],
    sizes: Mapping[str, LinearSize],
    threshold: float | None,
    *,
    errors: bool,
) -> Measured:
    """Runs the model once for each of mixq's schemes, and once for all others.

    Without `errors` the model is run for the outlier columns alone.
    """
    model = captured.model
    assert model is not None
    columns = calibrated_columns(history)
    found: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    own = [FINDS_COLUMNS, *(name for name in OWN_SCHEMES if errors and name in schemes)]
    for name in dict.fromkeys(own):
        scheme = get_scheme(name)
        taken = scheme if threshold is None else scheme.with_outliers(threshold=threshold)
        with step(f"measuring errors of {name}"):
            layers = layer_errors(model, dict.fromkeys(sizes, taken), captured.args, captured.kwargs, columns)
        if name == FINDS_COLUMNS:
            counts = {fqn: layer.found_columns for fqn, layer in layers.items()}
        if errors and name in schemes:
            found[name] = {fqn: layer.sqnr_db for fqn, layer in layers.items()}
    others = [name for name in schemes if errors and name in SIMULATED]
    if others:
        with step("simulating the number formats of other schemes"):
            limit = DEFAULT_THRESHOLD if threshold is None else threshold
            found |= simulated_errors(model, sizes, others, captured.args, captured.kwargs, limit)
    return Measured(found, counts)


@torch.no_grad()
def simulated_errors(
    model: nn.Module,
    sizes: Mapping[str, LinearSize],
    schemes: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    threshold: float,
) -> dict[str, dict[str, float]]:
    """SQNR in dB of each linear by itself, by scheme and layer: the model runs once, in full precision."""
    found: dict[str, dict[str, float]] = {scheme: {} for scheme in schemes}
    modules = dict(model.named_modules())
    handles = []

    def measure(fqn: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        weight = module.get_parameter("weight")
        w = (weight if isinstance(module, nn.Linear) else weight.T).float()
        problem = Problem(inputs[0].reshape(-1, w.shape[1]).float(), w, sizes[fqn], threshold)
        exact = problem.x @ w.T
        for scheme in schemes:
            found[scheme].setdefault(fqn, sqnr(exact, SIMULATED[scheme](problem)))

    try:
        for fqn in sizes:
            module = modules.get(fqn)
            if module is not None and isinstance(getattr(module, "weight", None), Tensor):

                def hook(module: nn.Module, inputs: Any, fqn: str = fqn) -> None:
                    measure(fqn, module, inputs)

                handles.append(module.register_forward_pre_hook(hook))
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
