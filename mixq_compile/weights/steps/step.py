"""What a step is, and a parameter after several of them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Step(Hashable, Protocol):
    """A function of one tensor that keeps its shape; equal steps compute the same."""

    dtype: torch.dtype | None
    """Of the result in memory; None: the parameter's."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor after the step, in the dtype of the argument (fp32 or fp64)."""


def result_dtype(tensor: Tensor, steps: Sequence[Step]) -> torch.dtype:
    """The dtype that `computed` returns."""
    named = [step.dtype for step in steps if step.dtype is not None]
    return named[-1] if named else tensor.dtype


def computed(tensor: Tensor, steps: Sequence[Step]) -> Tensor:
    """A tensor after several steps, computed in fp32 (fp64 for fp64) and rounded once; never a view of it."""
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    value = tensor.detach().to(wide)
    for step in steps:
        value = step(value)
    return value.to(result_dtype(tensor, steps), copy=True, memory_format=torch.contiguous_format)


def _digest(factors: Tensor) -> str:
    return hashlib.sha256(factors.numpy().tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Scaled:
    """A tensor times a factor for each index of one dimension: `weight * s[None, :]` for dimension 1."""

    dim: int
    factors: Tensor
    """[size of the dimension] fp32 on the CPU; never written."""
    digest: str = field(init=False)
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", self.factors.detach().float().cpu().contiguous())
        object.__setattr__(self, "digest", _digest(self.factors))

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor` with each slice along the dimension times its factor."""
        shape = [1] * tensor.dim()
        shape[self.dim] = len(self.factors)
        return tensor * self.factors.to(tensor.device, tensor.dtype).reshape(shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaled) and (self.dim, self.digest) == (other.dim, other.digest)

    def __hash__(self) -> int:
        return hash((self.dim, self.digest))


@dataclass(frozen=True)
class Shifted:
    """A tensor plus a number, as in the `1 + weight` of some norms."""

    addend: float
    dtype: torch.dtype | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """`tensor + addend`."""
        return tensor + self.addend


@dataclass(frozen=True)
class Cast:
    """A tensor in another dtype, as the model's code casts it; what follows is computed in fp32 anyway."""

    dtype: torch.dtype | None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor itself: the last cast decides how the result is stored."""
        return tensor
