"""Integer codes of a weight as operators take them: per row, int8 or two 4-bit codes a byte.

A weight of 8 bits is int8 `[N, K]`; one of 4 bits is uint8 `[N, ceil(K/2)]`, the even column in the
low nibble. What formats mean and how codes are packed is `mixq_compile.weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.errors import OptionError
from mixq_compile.formats import INT4, INT8, TensorFormat
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights import packing, rounding
from mixq_compile.weights.packing import ROW_ALIGNMENT, aligned_empty, codes_dtype
from mixq_compile.weights.recipe import make, refuse_beyond_codes
from mixq_compile.weights.rounding import EPSILON

__all__ = [
    "EPSILON",
    "ROW_ALIGNMENT",
    "aligned_empty",
    "codes_dtype",
    "dequantize_weight",
    "format_name",
    "format_of",
    "integer_codes",
    "pack_int4",
    "quantize_weight",
    "unpack_int4",
    "weight_bits",
]


def aligned(codes: Tensor) -> Tensor:
    """Codes `[N, bytes]` whose rows begin at multiples of 16 bytes: these, or a copy where they do not."""
    if codes.stride(0) % ROW_ALIGNMENT == 0:
        return codes
    return aligned_empty((codes.shape[0],), codes.shape[1], codes.dtype, codes.device).copy_(codes)


def weight_bits(weight_codes: Tensor) -> int:
    """8 for int8 codes, 4 for packed uint8 ones."""
    return 4 if weight_codes.dtype == torch.uint8 else 8


def told_by_codes(fmt: TensorFormat) -> bool:
    """True for the formats that the dtype of the codes tells: those of the integer kernels."""
    return fmt in (INT4, INT8)


def format_operand(fmt: TensorFormat) -> dict[str, str]:
    """The operand `weight_format` of a linear with weights of this format, where one is needed."""
    return {} if told_by_codes(fmt) else {"weight_format": str(fmt)}


def format_name(weight_codes: Tensor) -> str:
    """The text of `format_of`, without making a value of it: asked in every call."""
    return "int4" if weight_codes.dtype == torch.uint8 else "int8"


def format_of(weight_codes: Tensor) -> TensorFormat:
    """The format of a weight that integer kernels multiply: a scale for each row."""
    return INT4 if weight_codes.dtype == torch.uint8 else INT8


def pack_int4(codes: Tensor) -> Tensor:
    """Packs int8 codes in [-8, 7], `[N, K]`, into uint8 `[N, ceil(K/2)]`; an odd K pads with code 0."""
    return packing.pack(codes, INT4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The int8 codes `[N, columns]` of a packed weight."""
    return packing.unpack(packed, INT4, columns)


def integer_codes(weight_codes: Tensor, in_features: int) -> Tensor:
    """int8 codes `[N, K]` of a weight of either width."""
    return packing.unpack(weight_codes, format_of(weight_codes), in_features)


def quantize_weight(weight: Tensor, recipe: WeightRecipe) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales `[N]` of a weight `[N, K]`, one scale per output channel.

    Codes are int8 `[N, K]` or, for 4 bits, packed uint8 `[N, ceil(K/2)]`. Raises OptionError for a recipe
    that has more than these, or another format.
    """
    fmt = recipe.format
    if not fmt.per_row or fmt.bits not in (4, 8):
        raise OptionError(f"no kernel multiplies {fmt} weights: int8 and int4, with a scale for each row.")
    refuse_beyond_codes(recipe, "a mixed-precision product")
    made = make(recipe, weight, torch.float32)
    return made.codes, made.scale


def dequantize_weight(weight_codes: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """The fp32 weight `[N, K]` that codes and scales `[N]` stand for."""
    codes = integer_codes(weight_codes, in_features)
    return rounding.values(codes, weight_scale, None, format_of(weight_codes))
