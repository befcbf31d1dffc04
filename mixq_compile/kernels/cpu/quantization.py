"""`quantize` and `quantize_online` on the CPU: one pass over the rows, learning only where one exceeds."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from mixq_compile.kernels.cpu.availability import PRIORITY, supports
from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import CPU, QuantizeArguments, pointer, row_matrix, type_number
from mixq_compile.kernels.ref.quantization import among, learn, teaching
from mixq_compile.ops.activation_codes import largest_code
from mixq_compile.ops.outlier_state import FROZEN
from mixq_compile.ops.providers import provider
from mixq_compile.ops.small_batch import is_small_batch
from mixq_compile.ops.state_access import STATES
from mixq_compile.ops.weight_codes import ROW_ALIGNMENT


class Quantization:
    """The results of one quantization of `[*leading, columns]`, filled in place and possibly again."""

    def __init__(
        self,
        leading: tuple[int, ...],
        columns: int,
        dtype: torch.dtype,
        index: Tensor,
        column_slot: Tensor,
        format: str,
        row_mask: Tensor | None = None,
    ) -> None:
        self.columns, self.largest_code = columns, largest_code(format)
        self.index, self.column_slot = index, column_slot
        self.row_mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
        padded = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
        self.codes = torch.empty((*leading, padded), dtype=torch.int8, device=CPU)
        self.scale = torch.empty(leading, dtype=torch.float32, device=CPU)
        self.outliers = torch.empty((*leading, index.shape[0]), dtype=dtype, device=CPU)
        self.used = torch.empty(1, dtype=torch.int32, device=CPU)

    def arguments(self, counters: Tensor | None, threshold: Tensor | None) -> QuantizeArguments:
        """State and results for a kernel: without counters no column is an outlier.

        With a threshold the kernel returns whether a row exceeds it and the state is not frozen.
        """
        return QuantizeArguments(
            self.index.data_ptr(), self.column_slot.data_ptr(), pointer(counters), pointer(threshold),
            self.codes.data_ptr(), self.scale.data_ptr(), self.outliers.data_ptr(), self.used.data_ptr(),
            pointer(self.row_mask), self.columns, self.index.shape[0], self.codes.shape[-1],
            self.largest_code, torch.get_num_threads(),
        )  # fmt: skip

    def run(self, x: Tensor, counters: Tensor | None, threshold: Tensor | None = None) -> bool:
        """Quantizes x `[M, K]`; returns what the kernel returns."""
        arguments = self.arguments(counters, threshold)
        exceeded = library().mixq_quantize(
            byref(arguments), x.data_ptr(), type_number(x.dtype), x.stride(0), x.shape[0]
        )
        return bool(exceeded)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes `[..., K]`, scale `[...]` and outliers `[..., C]`."""
        return self.codes[..., : self.columns], self.scale, self.outliers


@provider("quantize", name="cpu", priority=PRIORITY, supports=supports)
def quantize(
    x: Tensor, index: Tensor, column_slot: Tensor, count: Tensor, format: str, small_m: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows with fixed outlier columns."""
    call = Quantization(tuple(x.shape[:-1]), x.shape[-1], x.dtype, index, column_slot, format)
    call.run(row_matrix(x), count if index.shape[0] else None)
    return call.results()


@provider("quantize_online", name="cpu", priority=PRIORITY, supports=supports)
def quantize_online(
    x: Tensor,
    index: Tensor,
    column_slot: Tensor,
    column_max: Tensor,
    counters: Tensor,
    effective_threshold: Tensor,
    format: str,
    miss: str,
    small_m: int,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes rows with the columns known so far; where a row exceeds, learns and quantizes again."""
    matrix = row_matrix(x)
    shared = (index, column_slot, column_max, counters, effective_threshold)
    state = STATES.current(shared)
    call = Quantization(tuple(x.shape[:-1]), x.shape[-1], x.dtype, state[0], state[1], format, row_mask)
    if is_small_batch(matrix, small_m) or not matrix.numel():
        call.run(matrix, None)
        return *call.results(), call.used
    if miss == "per_call" and not int(counters[FROZEN]):
        values = matrix.float()
        state = learn(values, among(None, row_mask, values), shared, miss)
        call.index, call.column_slot = state[:2]
    if call.run(matrix, state[3], None if miss in ("static", "per_call") else state[4]):
        values = matrix.float()
        state = learn(values, among(teaching(call.scale.view(-1)), row_mask, values), shared, miss)
        if miss != "lazy":
            call.index, call.column_slot = state[:2]
            call.run(matrix, state[3])
    return *call.results(), call.used
