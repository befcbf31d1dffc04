"""Integer codes of a weight: solving for scales, packing two 4-bit codes a byte, and back.

A weight of 8 bits is int8 `[N, K]`; one of 4 bits is uint8 `[N, ceil(K/2)]`, the even column in the
low nibble. Rows are padded in memory to a stride of 16 bytes (what TMA needs); K stays logical.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.errors import OptionError
from mixq_compile.formats import INT4, INT8, TensorFormat
from mixq_compile.scheme import WeightRecipe

ROW_ALIGNMENT = 16
EPSILON = 2.0**-96
CLIP_CANDIDATES = 41
SMALLEST_CLIP = 0.5


def aligned_empty(leading: tuple[int, ...], columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised `[*leading, columns]` tensor of bytes whose row stride is a multiple of 16."""
    padded = (columns + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    return torch.empty((*leading, padded), dtype=dtype, device=device)[..., :columns]


def weight_bits(weight_codes: Tensor) -> int:
    """8 for int8 codes, 4 for packed uint8 ones."""
    return 4 if weight_codes.dtype == torch.uint8 else 8


def format_name(weight_codes: Tensor) -> str:
    """The text of `format_of`, without making a value of it: asked in every call."""
    return "int4" if weight_codes.dtype == torch.uint8 else "int8"


def codes_dtype(fmt: TensorFormat) -> torch.dtype:
    """The dtype of codes in memory: int8, or uint8 where they count from 0 or several share a byte."""
    return torch.int8 if fmt.bits == 8 and fmt.signed else torch.uint8


def format_of(weight_codes: Tensor) -> TensorFormat:
    """The format of a weight that integer kernels multiply: a scale for each row."""
    return INT4 if weight_codes.dtype == torch.uint8 else INT8


def pack_int4(codes: Tensor) -> Tensor:
    """Packs codes in [-8, 7], or in [0, 15], `[N, K]`, into uint8 `[N, ceil(K/2)]`; an odd K pads with 0."""
    rows, columns = codes.shape
    if columns % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    low, high = codes[:, 0::2], codes[:, 1::2]
    packed = (low & 0xF).to(torch.uint8) | ((high & 0xF).to(torch.uint8) << 4)
    out = aligned_empty((rows,), packed.shape[1], torch.uint8, codes.device)
    return out.copy_(packed)


def unpack_uint4(packed: Tensor, columns: int) -> Tensor:
    """The codes 0 to 15, int8 `[N, columns]`, of a packed weight."""
    low = (packed & 0xF).to(torch.int8)
    high = (packed >> 4).to(torch.int8)
    return torch.stack((low, high), dim=-1).reshape(packed.shape[0], -1)[:, :columns]


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The int8 codes `[N, columns]` of a packed weight."""
    both = unpack_uint4(packed, columns)
    return torch.where(both > 7, both - 16, both)


def integer_codes(weight_codes: Tensor, in_features: int) -> Tensor:
    """int8 codes `[N, K]` of a weight of either width."""
    if weight_bits(weight_codes) == 4:
        return unpack_int4(weight_codes, in_features)
    return weight_codes


def _codes_for(weight: Tensor, scale: Tensor, fmt: TensorFormat) -> Tensor:
    lowest = -fmt.largest_code - (1 if fmt.bits == 4 else 0)
    return torch.round(weight / scale[:, None]).clamp_(lowest, fmt.largest_code)


def _clip_search(weight: Tensor, largest: Tensor, fmt: TensorFormat) -> Tensor:
    """The scale per row with the smallest squared error among clipped maxima."""
    largest_codes = torch.full_like(largest, fmt.largest_code)
    best_scale = largest / largest_codes
    best_error = torch.full_like(largest, torch.inf)
    ratios = torch.linspace(1.0, SMALLEST_CLIP, CLIP_CANDIDATES, dtype=torch.float32, device="cpu")
    for ratio in ratios.tolist():
        scale = (largest * ratio) / largest_codes
        error = (_codes_for(weight, scale, fmt) * scale[:, None] - weight).square_().sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def quantize_weight(weight: Tensor, recipe: WeightRecipe) -> tuple[Tensor, Tensor]:
    """Codes and fp32 scales `[N]` of a weight `[N, K]`, one scale per output channel.

    Codes are int8 `[N, K]` or, for 4 bits, packed uint8 `[N, ceil(K/2)]`.
    """
    fmt = recipe.format
    if not fmt.per_row or fmt.bits not in (4, 8):
        raise OptionError(f"no kernel multiplies {fmt} weights: int8 and int4, with a scale for each row.")
    values = weight.detach().float()
    largest = values.abs().amax(dim=1).clamp_min(EPSILON)  # [N]
    if recipe.solver == "clip":
        scale = _clip_search(values, largest, fmt)
    else:
        # A tensor, because GPUs divide by a number through its reciprocal, with another last bit.
        scale = largest / torch.full_like(largest, fmt.largest_code)
    codes = _codes_for(values, scale, fmt).to(torch.int8)
    if fmt.bits == 4:
        return pack_int4(codes), scale
    out = aligned_empty((codes.shape[0],), codes.shape[1], torch.int8, codes.device)
    return out.copy_(codes), scale


def dequantize_weight(weight_codes: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """The fp32 weight `[N, K]` that codes and scales `[N]` stand for."""
    return integer_codes(weight_codes, in_features).float() * weight_scale[:, None]


def refused_weight_format(weight: TensorFormat) -> str | None:
    """Why `dequantize_formatted` does not know what codes of a format mean; None where it does."""
    if weight.bits in (4, 8) and weight.scale == "float32":
        return None
    return f"it computes with codes of 4 and 8 bits and fp32 scales, not with {weight}"


def dequantize_formatted(
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    weight: TensorFormat,
    in_features: int,
) -> Tensor:
    """The fp32 weight `[N, K]`, `(codes - zero) * scale`, with scales and zero points `[N]` or `[N, G]`.

    Raises OptionError for a format whose codes have another meaning.
    """
    if (reason := refused_weight_format(weight)) is not None:
        raise OptionError(f"the reference cannot compute with this weight: {reason}.")
    if weight.bits == 4:
        unpack = unpack_int4 if weight.signed else unpack_uint4
        codes = unpack(weight_codes, in_features).float()
    else:
        codes = weight_codes.float()

    def of_each_column(values: Tensor) -> Tensor:
        if weight.group is None:
            return values[:, None]
        return values.repeat_interleave(weight.group, dim=1)[:, :in_features]

    if weight_zero is not None:
        codes = codes - of_each_column(weight_zero.float())
    return codes * of_each_column(weight_scale)
