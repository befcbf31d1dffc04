"""Tensors whose rows lie one below the other in one memory, so that one product can read them all.

Nothing is registered: whether tensors lie so is read from their addresses. Copies, casts and loading of a
model, which keep or break the arrangement, need no care.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixq_compile.ops.weight_codes import aligned_empty


def held_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor `[N]` or `[N, K]` in memory, the padding of its rows included."""
    return tensor.shape[0] * tensor.stride(0) * tensor.element_size() if tensor.numel() else 0


def _needs_no_memory(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.numel()


def _is_alone(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == held_bytes(tensor)


def _adjacent(parts: Sequence[Tensor]) -> bool:
    end = parts[0].storage_offset()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
            or part.storage_offset() != end
            or (part.dtype, part.stride(), part.shape[1:])
            != (parts[0].dtype, parts[0].stride(), parts[0].shape[1:])
        ):
            return False
        end += part.shape[0] * part.stride(0)
    return True


def joinable(parts: Sequence[Tensor]) -> bool:
    """Whether tensors `[N_i]` or `[N_i, K]` lie one below the other in this order, or can be laid so.

    They cannot where one lies beside others already: a graph may read it together with those.
    """
    if any(_needs_no_memory(part) for part in parts):
        return True
    return _adjacent(parts) or all(_is_alone(part) for part in parts)


def row_order(parts: Sequence[Tensor]) -> list[int]:
    """The places of tensors in the order in which they lie one below the other; else as they are given."""
    places = list(range(len(parts)))
    if any(_needs_no_memory(part) for part in parts):
        return places
    ordered = sorted(places, key=lambda place: parts[place].storage_offset())
    return ordered if _adjacent([parts[place] for place in ordered]) else places


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """One tensor `[N_1 + N_2 + …]` or `[N_1 + N_2 + …, K]` of `joinable` ones, which become views of it.

    The parts stay the same objects with the same values: what writes either writes both, and no second
    copy is kept.
    """
    first = parts[0].detach()
    rows = sum(part.shape[0] for part in parts)
    if any(_needs_no_memory(part) for part in parts):
        return first.new_empty((rows, *first.shape[1:]))
    if _adjacent(parts):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    if first.dim() == 2:
        whole = aligned_empty((rows,), first.shape[1], first.dtype, first.device)
    else:
        whole = torch.empty(rows, dtype=first.dtype, device=first.device)
    for part, place in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
        place.copy_(part)
        part.data = place
    return whole
