"""A weight as operators take it: its codes and what belongs to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mixq_compile.formats import TensorFormat
from mixq_compile.weights import packing, rounding

OPERANDS = {
    "codes": "weight_codes",
    "scale": "weight_scale",
    "zero": "weight_zero",
    "sums": "weight_sums",
    "left": "left",
    "right": "right",
}
"""The operands of operators by the fields of a QuantizedWeight."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The tensors that stand for a weight `[N, K]`; `recipe.parts` has their shapes and dtypes."""

    codes: Tensor
    """Packed: `[N, ceil(K * bits / 8)]`, in rows that begin at multiples of 16 bytes."""
    scale: Tensor
    """fp32 `[N]` or, in groups, `[N, G]`; of shared exponents uint8, with a bias of 127."""
    zero: Tensor | None = None
    """uint8, of the scales' shape: zero points, of a format without a sign."""
    sums: Tensor | None = None
    """int32, of the scales' shape: sums of the codes less their zero points."""
    left: Tensor | None = None
    """`[K, r]`: with `right` the part of the rounding error that is kept, `x·Wᵀ ≈ x·Wqᵀ + (x·left)·right`."""
    right: Tensor | None = None
    """`[r, N]`."""
    kept: Tensor | None = None
    """fp32 `[N, n]`: columns that stay in 16 bit, as they were solved for beside the codes; no operand."""

    def named(self) -> dict[str, Tensor]:
        """The tensors that exist, by the names that operands have."""
        tensors = {operand: getattr(self, field) for field, operand in OPERANDS.items()}
        return {operand: tensor for operand, tensor in tensors.items() if tensor is not None}

    @classmethod
    def from_named(cls, named: dict[str, Tensor]) -> QuantizedWeight:
        """The weight of tensors by the names that operands have; further ones do no harm."""
        return cls(**{field: named[operand] for field, operand in OPERANDS.items() if operand in named})

    def rounded(self, fmt: TensorFormat, in_features: int) -> Tensor:
        """The fp32 weight `[N, K]` that codes, scales and zero points stand for."""
        return rounding.values(packing.unpack(self.codes, fmt, in_features), self.scale, self.zero, fmt)

    def dequantized(self, fmt: TensorFormat, in_features: int) -> Tensor:
        """The fp32 weight `[N, K]` that all its tensors stand for, the low-rank part included."""
        weight = self.rounded(fmt, in_features)
        if self.left is not None and self.right is not None:
            weight = weight + (self.left.float() @ self.right.float()).T
        return weight

    def outlier_columns(self, fmt: TensorFormat, in_features: int, kept_columns: Tensor | None) -> Tensor:
        """The fp32 weight `[N, K]` that outlier columns are taken from: kept ones as they were solved for."""
        weight = self.dequantized(fmt, in_features)
        if self.kept is not None and kept_columns is not None:
            weight[:, kept_columns.to(weight.device)] = self.kept
        return weight
