"""Rotation by Hadamard matrices: spreads outliers of single channels over all of them.

H of K channels is orthonormal. With K = m · 2^n, m odd, it is a Hadamard matrix of order K where Paley's
constructions give one of an order m · 2^j of at most `LARGEST_BASE` (j <= n; 1, 2, 12, 20, 28, …), doubled
up to K by Sylvester's; else it is block-diagonal, m blocks of order 2^n.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.errors import OptionError

LARGEST_BASE = 256
"""Largest order that is multiplied as a dense matrix because nothing splits it further."""


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> Tensor:
    """The matrix of quadratic characters of i - j, `[prime, prime]`."""
    squares = {value * value % prime for value in range(1, prime)}
    character = [0 if value == 0 else 1 if value in squares else -1 for value in range(prime)]
    rows = [[character[(row - column) % prime] for column in range(prime)] for row in range(prime)]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _bordered(prime: int, sign: int) -> Tensor:
    """The conference matrix of order prime + 1: symmetric for sign 1, antisymmetric for sign -1."""
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64, device="cpu")
    matrix[0, 1:], matrix[1:, 0] = 1.0, float(sign)
    matrix[1:, 1:] = _jacobsthal(prime)
    return matrix


@functools.lru_cache(maxsize=64)
def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of this order that needs no doubling, entries 1 and -1; None where none is known."""
    if order <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")[:order, :order]
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64, device="cpu") + _bordered(order - 1, -1)
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
        unit = torch.eye(half, dtype=torch.float64, device="cpu")
        return torch.kron(_bordered(half - 1, 1), ones) + torch.kron(unit, corner)
    return None


def _power(order: int) -> Tensor:
    """Sylvester's matrix of an order that is a power of two, entries 1 and -1."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    while len(matrix) < order:
        matrix = torch.kron(matrix, two)
    return matrix


@dataclass(frozen=True)
class Rotation:
    """The rotation H of K channels, as the Kronecker product `kron(left, right)` of two matrices."""

    left: Tensor
    """[P, P] fp64, orthonormal; K = P · Q."""
    right: Tensor
    """[Q, Q] fp64, orthonormal and symmetric."""
    text: str
    """Such as `Hadamard of order 4096`, or `43 Hadamard blocks of order 256`."""


@functools.lru_cache(maxsize=64)
def rotation_of(channels: int) -> Rotation | None:
    """The rotation of so many channels; None for an odd number of them, which stay as they are."""
    power = channels & -channels
    odd = channels // power
    if power == 1:
        return None
    bases = [odd << shift for shift in range(power.bit_length()) if odd << shift <= LARGEST_BASE]
    base = next(((order, found) for order in bases if (found := _paley(order)) is not None), None)
    if base is not None:
        order, core, text = *base, f"Hadamard of order {channels}"
    else:
        # The unit matrix's entries are 0 and 1, so that it scales as one block does.
        order, core = odd, torch.eye(odd, dtype=torch.float64, device="cpu") * math.sqrt(odd)
        text = f"{odd} Hadamard blocks of order {power}"
    rest = channels // order
    # Two factors of about equal size: each channel then costs about 2 * sqrt(K) products.
    width = 1
    while width < rest and width * width < channels:
        width *= 2
    left = torch.kron(core, _power(rest // width))
    right = _power(width)
    return Rotation(left / math.sqrt(len(left)), right / math.sqrt(width), text)


@dataclass(frozen=True)
class Rotate:
    """Rotates x and W alike: `(x · H) · (W · H)ᵀ = x · Wᵀ`."""

    def matrix(self, channels: int) -> Tensor:
        """H, `[K, K]` fp64. Raises OptionError for an odd number of channels."""
        found = rotation_of(channels)
        if found is None:
            raise OptionError(
                f"{channels} channels, an odd number, cannot be rotated: leave this linear out."
            )
        return torch.kron(found.left, found.right)


@dataclass(frozen=True)
class Rotated:
    """A tensor rotated along one dimension: `weight · H` for dimension 1, `Hᵀ · weight` for dimension 0."""

    dim: int
    dtype: torch.dtype | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor with each vector along the dimension times H."""
        moved: Tensor = tensor.movedim(self.dim, -1)
        found = rotation_of(moved.shape[-1])
        if found is None:
            return tensor
        left, right = (each.to(tensor.device, tensor.dtype) for each in (found.left, found.right))
        split = moved.unflatten(-1, (len(left), len(right)))
        rotated: Tensor = (left.t() @ (split @ right)).flatten(-2)
        return rotated.movedim(-1, self.dim)
