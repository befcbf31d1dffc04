"""What a weight holds, in a few numbers: by it a write is seen that torch does not count.

A write through `.data`, numpy, DLPack or a storage leaves a tensor's version and address as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Bytes of a weight that one sum covers: on a GPU a launch costs as much as reading many."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


def _as_matrix(weight: Tensor) -> Tensor:
    """A weight as a matrix; a vector, such as a norm's, is one row."""
    return weight.detach() if weight.dim() == 2 else weight.detach().reshape(1, -1)


def block_rows(weight: Tensor) -> int:
    """How many rows of a weight one sum covers."""
    bytes_of_row = max(1, weight.nbytes // max(1, _as_matrix(weight).shape[0]))
    return max(1, BLOCK_BYTES.get(weight.device.type, 1 << 20) // bytes_of_row)


def blocks(weight: Tensor) -> Iterator[Tensor]:
    """The weight in blocks of `block_rows` rows."""
    return iter(_as_matrix(weight).split(block_rows(weight)))


def block(weight: Tensor, number: int) -> Tensor:
    """One of the blocks."""
    rows = block_rows(weight)
    return _as_matrix(weight)[number * rows : (number + 1) * rows]


def block_count(weight: Tensor) -> int:
    """How many blocks a weight has."""
    return math.ceil(_as_matrix(weight).shape[0] / block_rows(weight))


def _as_integers(block: Tensor) -> list[Tensor]:
    """The bits of a matrix as integers, eight bytes at once where its rows divide into them.

    Those sums wrap around, and of the highest bit, a sign, an even number of changes would be lost: the upper
    halves are there a second time.
    """
    size = block.element_size()
    if not block.is_contiguous() or block.shape[1] * size % 8 or block.data_ptr() % 8:
        return [block.view(_INTEGERS[size])]
    bits = block.view(torch.int64)
    return [bits, bits >> 32]


def content_sum(block: Tensor) -> Tensor:
    """A 64-bit sum of a matrix's bits on its device, without waiting for it: int64, no dimensions.

    Row and column sums, each weighted by its place: exchanged rows, columns or elements change it.
    """
    along = [bits.sum(dim=dim, dtype=torch.int64) for bits in _as_integers(block) for dim in (0, 1)]
    sums = torch.cat(along)
    places = torch.arange(1, len(sums) + 1, dtype=torch.int64, device=block.device)
    return (sums * (places * _MULTIPLIER)).sum()


def content_of(weight: Tensor) -> Tensor:
    """The sums of a weight's blocks, int64 on its device."""
    return torch.stack([content_sum(block) for block in blocks(weight)])
