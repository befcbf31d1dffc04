"""The products on the CPU: `mixed_linear`, its two halves, and `weight_only_linear`."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from mixq_compile.kernels.cpu.availability import PRIORITY, supports
from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import (
    ACTIVATIONS,
    CPU,
    LinearArguments,
    WeightCodes,
    WeightOnlyArguments,
    adjacent,
    pointer,
    row_matrix,
    type_number,
)
from mixq_compile.kernels.cpu.measured import mixed_speedup, weight_only_speedup
from mixq_compile.ops.outlier_state import COUNT
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch

STREAMED_ROWS = 48
"""Up to so many rows a weight-only product reads the codes directly; beyond, it expands the weight."""
EXPANDED_ELEMENTS = 1 << 20
"""How much of a weight is expanded to float32 at once: 4 MiB stay in a cache."""


class LinearOperands:
    """The operands of a mixed linear, kept while a kernel has their addresses.

    codes `[..., K]`, scale `[...]`, outliers `[..., C]`, weight_codes `[N, K]`, outlier_weight `[N, C]`;
    without slots (C = 0) count is not read.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor | None,
        outliers: Tensor,
        count: Tensor,
        weight_codes: Tensor,
        weight_scale: Tensor | None,
        outlier_weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        slots = outliers.shape[-1]
        self.codes, self.weight_codes = row_matrix(codes), row_matrix(weight_codes)
        self.outliers = row_matrix(outliers) if slots else outliers
        self.outlier_weight = row_matrix(outlier_weight) if slots else outlier_weight
        self.count = count if slots else None
        self.scale, self.weight_scale, self.bias = adjacent(scale), adjacent(weight_scale), adjacent(bias)

    def arguments(self, result: Tensor | None, dtype: torch.dtype, activation: str) -> LinearArguments:
        """The operands for a kernel that gives a result of this dtype."""
        codes, bias, outlier_weight = self.codes, self.bias, self.outlier_weight
        return LinearArguments(
            codes.data_ptr(), pointer(self.scale), self.outliers.data_ptr(), pointer(self.count),
            WeightCodes.of(self.weight_codes, codes.shape[1]), pointer(self.weight_scale),
            outlier_weight.data_ptr(), pointer(bias), pointer(result), codes.shape[0], codes.stride(0),
            self.outliers.stride(0), outlier_weight.stride(0), type_number(self.outliers.dtype),
            type_number(outlier_weight.dtype), type_number(dtype if bias is None else bias.dtype),
            type_number(dtype), ACTIVATIONS[activation], torch.get_num_threads(),
        )  # fmt: skip

    def multiply(self, result: Tensor, activation: str = "none") -> Tensor:
        """Fills and returns result `[..., N]`: with the bare sums if of int32, else with the linear."""
        arguments = self.arguments(result, result.dtype, activation)
        library().mixq_mixed_linear(byref(arguments))
        return result


@provider("mixed_gemm", name="cpu", priority=PRIORITY, supports=supports)
def mixed_gemm(
    codes: Tensor, outliers: Tensor, count: Tensor, weight_codes: Tensor, outlier_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The integer and the outlier product, not yet joined: for looking at, not for speed."""
    accumulator = torch.empty((*codes.shape[:-1], weight_codes.shape[0]), dtype=torch.int32, device=CPU)
    integers = LinearOperands(codes, None, outliers[..., :0], count, weight_codes, None, outlier_weight, None)
    used = int(count[COUNT]) if outliers.shape[-1] else 0
    product = outliers[..., :used].float() @ outlier_weight[:, :used].float().T
    return integers.multiply(accumulator), product


@provider("dequantize", name="cpu", priority=PRIORITY, supports=supports)
def dequantize(
    x: Tensor,
    accumulator: Tensor,
    outlier_product: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Joins what `mixed_gemm` returns."""
    result = accumulator.float().mul_(scale[..., None]).mul_(weight_scale).add_(outlier_product)
    return (result if bias is None else result.add_(bias)).to(x.dtype)


@provider("mixed_linear", name="cpu", priority=PRIORITY, supports=supports, speedup=mixed_speedup)
def mixed_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    small_m: int,
) -> Tensor:
    """The whole product in one kernel: neither integer sums nor outlier products go through memory."""
    if is_small_batch(codes, small_m):
        return weight_only_linear(x, weight_codes, weight_scale, bias)  # type: ignore[no-any-return]
    operands = LinearOperands(codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias)
    return operands.multiply(torch.empty((*x.shape[:-1], weight_codes.shape[0]), dtype=x.dtype, device=CPU))


def _expanded_product(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x `[M, K]` in fp32 times the weight, expanded to float32 a block of rows at a time: `[M, N]`."""
    columns, features = x.shape[1], weight_codes.shape[0]
    result = torch.empty(x.shape[0], features, dtype=torch.float32, device=CPU)
    block = min(features, max(1, EXPANDED_ELEMENTS // max(1, columns)))
    space = torch.empty(block, columns, dtype=torch.float32, device=CPU)
    for first in range(0, features, block):
        codes = weight_codes[first : first + block]
        expanded = space[: codes.shape[0]]
        library().mixq_expand_weight(
            byref(WeightCodes.of(codes, columns)), weight_scale[first:].data_ptr(), expanded.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        torch.mm(x, expanded.T, out=result[:, first : first + block])
    return result if bias is None else result.add_(bias)


@provider("weight_only_linear", name="cpu", priority=PRIORITY, supports=supports, speedup=weight_only_speedup)
def weight_only_linear(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Few rows stream the codes; many go through a float32 product of the expanded weight."""
    shape = (*x.shape[:-1], weight_codes.shape[0])
    matrix, weight_codes, bias = row_matrix(x), row_matrix(weight_codes), adjacent(bias)
    rows, columns = matrix.shape
    if rows > STREAMED_ROWS:
        return _expanded_product(matrix.float(), weight_codes, weight_scale, bias).to(x.dtype).view(shape)
    result = torch.empty(shape, dtype=x.dtype, device=CPU)
    arguments = WeightOnlyArguments(
        matrix.data_ptr(), WeightCodes.of(weight_codes, columns), weight_scale.data_ptr(), pointer(bias),
        result.data_ptr(), rows, matrix.stride(0), type_number(x.dtype),
        type_number(x.dtype if bias is None else bias.dtype), torch.get_num_threads(),
    )  # fmt: skip
    library().mixq_weight_only_linear(byref(arguments))
    return result
