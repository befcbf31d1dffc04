"""Codes of 2, 4 or 8 bits as bytes, in rows that begin at multiples of 16 bytes (what TMA needs).

Codes of 8 bits stay as they are: int8, or uint8 where they count from 0. Narrower ones lie several in a byte
(uint8), the first column in the lowest bits, in two's complement where they have a sign; the rest of a last
byte is zero. K stays logical: the padding of a row belongs to its stride.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixq_compile.formats import TensorFormat

ROW_ALIGNMENT = 16


def padded(size: int) -> int:
    """The bytes that a row of `size` bytes takes in memory."""
    return (size + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT


def aligned_empty(leading: tuple[int, ...], columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised `[*leading, columns]` tensor of bytes whose row stride is a multiple of 16."""
    return torch.empty((*leading, padded(columns)), dtype=dtype, device=device)[..., :columns]


def codes_dtype(fmt: TensorFormat) -> torch.dtype:
    """The dtype of codes in memory: int8, or uint8 where they count from 0 or several share a byte."""
    return torch.int8 if fmt.bits == 8 and fmt.signed else torch.uint8


def pack(codes: Tensor, fmt: TensorFormat) -> Tensor:
    """The bytes `[N, ceil(K * bits / 8)]` of codes `[N, K]`, int8 or uint8 within the format's range."""
    rows, columns = codes.shape
    out = aligned_empty((rows,), math.ceil(columns * fmt.bits / 8), codes_dtype(fmt), codes.device)
    if fmt.bits == 8:
        return out.copy_(codes)
    share = 8 // fmt.bits
    if columns % share:
        codes = torch.nn.functional.pad(codes, (0, -columns % share))
    out.zero_()
    for place in range(share):
        part = (codes[:, place::share] & ((1 << fmt.bits) - 1)).to(torch.uint8)
        out |= part << (place * fmt.bits)
    return out


def unpack(packed: Tensor, fmt: TensorFormat, in_features: int) -> Tensor:
    """The codes `[N, K]` of a packed weight: int8, or uint8 where they count from 0."""
    if fmt.bits == 8:
        return packed
    mask = (1 << fmt.bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, fmt.bits)]
    codes = torch.stack(parts, dim=-1).reshape(packed.shape[0], packed.shape[1] * len(parts))
    codes = codes[:, :in_features]
    if not fmt.signed:
        return codes
    codes = codes.to(torch.int8)
    return torch.where(codes > mask >> 1, codes - (mask + 1), codes)
