"""The C interface of kernels.cpp: its structures, its functions, and the numbers that stand for dtypes."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mixq_compile.errors import KernelError
from mixq_compile.ops.activation_functions import QUANTIZING
from mixq_compile.ops.weight_codes import weight_bits

CPU = torch.device("cpu")
"""Where every tensor whose address a kernel gets must be, whatever torch's default device is."""
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
ACTIVATIONS = {name: number for number, name in enumerate(QUANTIZING)}
"""What a kernel can apply to a linear's result, and its number there; `gelu` is the exact one."""


def _fields(pointers: str, longs: str = "", ints: str = "") -> list[tuple[str, type]]:
    named = ((pointers, c_void_p), (longs, c_int64), (ints, c_int32))
    return [(name, kind) for names, kind in named for name in names.split()]


class WeightCodes(Structure):
    """Codes of a weight `[N, K]`."""

    _fields_ = _fields("codes", "rows columns stride bits")

    @classmethod
    def of(cls, codes: Tensor, columns: int) -> WeightCodes:
        """The codes of a `row_matrix` with K = `columns`."""
        return cls(codes.data_ptr(), codes.shape[0], columns, codes.stride(0), weight_bits(codes))


class LinearArguments(Structure):
    """One mixed linear."""

    _fields_ = (
        *_fields("codes scale outliers counters"),
        ("weight", WeightCodes),
        *_fields(
            "weight_scale outlier_weight bias result",
            "rows codes_stride outliers_stride outlier_weight_stride",
            "outliers_type outlier_weight_type bias_type result_type activation threads",
        ),
    )


class QuantizeArguments(Structure):
    """State and results of one quantization."""

    _fields_ = _fields(
        "index column_slot counters threshold codes scale outliers used row_mask",
        "columns capacity codes_stride",
        "largest_code threads",
    )


class WeightOnlyArguments(Structure):
    """One weight-only linear."""

    _fields_ = (
        *_fields("x"),
        ("weight", WeightCodes),
        *_fields("weight_scale bias result", "rows x_stride", "type bias_type threads"),
    )


class RefreshArguments(Structure):
    """The outlier weight of one linear, and where its columns come from."""

    _fields_ = (
        *_fields("index counters cached_index outlier_weight"),
        ("weight", WeightCodes),
        *_fields(
            "scale original",
            "capacity outlier_weight_stride original_row_stride original_column_stride",
            "outlier_weight_type original_type",
        ),
    )


class WeightRoundingArguments(Structure):
    """Rows of a weight, and the codes and scales that they become."""

    _fields_ = _fields("values codes scale", "rows columns stride codes_stride", "type bits threads")


def open_library(path: Path) -> ctypes.CDLL:
    """The compiled kernels at this path with the types of their functions. Raises OSError."""
    library = ctypes.CDLL(str(path))
    for name, result, arguments in (
        ("quantize", c_int, (c_void_p, c_void_p, c_int, c_int64, c_int64)),
        ("mixed_linear", None, (c_void_p,)),
        ("quantized_linear", c_int, (c_void_p, c_void_p, c_int)),
        ("weight_only_linear", None, (c_void_p,)),
        ("expand_weight", None, (c_void_p, c_void_p, c_void_p, c_int)),
        ("refresh", None, (c_void_p,)),
        ("round_weight", c_int64, (c_void_p,)),
    ):
        function = getattr(library, f"mixq_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def type_number(dtype: torch.dtype) -> int:
    """The number by which kernels know a dtype. Raises KernelError for one they do not know."""
    number = _TYPES.get(dtype)
    if number is None:
        raise KernelError(f"the CPU kernels take float32, bfloat16 and float16 tensors, not {dtype}.")
    return number


def row_matrix(tensor: Tensor) -> Tensor:
    """The tensor as `[rows, columns]` with adjacent columns; a copy only where there is no such view."""
    if tensor.dim() != 2:
        tensor = tensor.flatten(0, -2) if tensor.dim() > 2 else tensor.unsqueeze(0)
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def adjacent(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its elements adjacent in memory."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()
