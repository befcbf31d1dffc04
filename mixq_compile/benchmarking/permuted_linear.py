"""A mixed linear whose outlier columns were moved out of the matrices: the layout beside ours.

Activation columns are gathered into inner and outlier ones, the weight lies in the same order, and the
integer product runs over the inner columns only. All kernels are the same as for our layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile import ops
from mixq_compile.benchmarking.packed_linear import ACTIVATION, PackedLinear, Quantized
from mixq_compile.ops.weight_codes import aligned_empty


@dataclass(frozen=True)
class PermutedLinear:
    """A packed weight in permuted order. N = out_features, I inner columns, C outlier columns."""

    linear: PackedLinear
    inner: Tensor
    """[I] int64: columns of the activation, ascending."""
    outer: Tensor
    """[C] int64."""
    codes: Tensor
    """[N, I] int8."""
    outlier_weight: Tensor
    """[N, C]"""
    no_index: Tensor
    no_slots: Tensor
    count: Tensor

    @classmethod
    def of(cls, linear: PackedLinear, columns: Sequence[int]) -> PermutedLinear:
        """The linear with these columns, a multiple of 16, moved out."""
        device = linear.codes.device
        outer = torch.tensor(columns, dtype=torch.int64, device=device)
        is_inner = torch.ones(linear.weight.shape[1], dtype=torch.bool, device=device)
        is_inner[outer] = False
        inner = is_inner.nonzero().flatten()
        codes = aligned_empty((linear.weight.shape[0],), len(inner), torch.int8, device)
        return cls(
            linear=linear,
            inner=inner,
            outer=outer,
            codes=codes.copy_(linear.codes.index_select(1, inner)),
            outlier_weight=linear.weight.index_select(1, outer),
            no_index=torch.zeros(0, dtype=torch.int32, device=device),
            no_slots=torch.full((len(inner),), -1, dtype=torch.int32, device=device),
            count=torch.tensor([len(columns)], dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and outlier weights."""
        return self.codes.nbytes + self.outlier_weight.nbytes

    def gather(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inner columns `[M, I]` and the outlier columns `[M, C]` of an activation."""
        return x.index_select(1, self.inner), x.index_select(1, self.outer)

    def quantize(self, inner: Tensor, outliers: Tensor) -> Quantized:
        """Codes and scales of the inner columns."""
        codes, scale, _ = ops.quantize(
            inner, self.no_index, self.no_slots, self.count, str(ACTIVATION), 0, self.linear.kernel
        )
        return Quantized(codes, scale, outliers, self.count)

    def multiply(self, x: Tensor, quantized: Quantized) -> Tensor:
        """The product `[M, N]`."""
        return ops.mixed_linear(  # type: ignore[no-any-return]
            x, *quantized, self.codes, self.linear.scale, self.outlier_weight, None, 0, self.linear.kernel
        )

    def whole(self, x: Tensor) -> Tensor:
        """Gather, quantization and product."""
        return self.multiply(x, self.quantize(*self.gather(x)))

    def permute_again(self) -> None:
        """Another set of outlier columns: every row of the weight in a new order."""
        self.codes.copy_(self.linear.codes.index_select(1, self.inner))
        self.outlier_weight.copy_(self.linear.weight.index_select(1, self.outer))

    def move_one(self) -> None:
        """One column more, at best: the last inner column takes its place, and its weight moves out."""
        self.codes[:, 0] = self.codes[:, -1]
        self.outlier_weight[:, -1] = self.linear.weight[:, self.outer[-1:]].flatten()
        self.inner[0] = self.inner[-1]
