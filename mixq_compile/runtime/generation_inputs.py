"""Fills prompts and batches up to compiled sizes, so that no result changes and nothing is learned by it.

What fills up is a copy of what is there: a row repeats the last row, and a position repeats the last token
of its prompt, with the same position and the same part of the attention mask. Its hidden states are those of
what it repeats, so that an outlier state meets no value that the call has not brought anyway. Nobody attends
to it: the keys of positions behind a prompt are overwritten by the tokens that are generated, and masked
until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PADDED = ("input_ids", "position_ids", "attention_mask")
"""Inputs with a dimension of tokens."""


@dataclass(frozen=True)
class Prompt:
    """Sizes of one call: those of the user, and those that it is filled up to."""

    rows: int
    length: int
    batch: int
    filled: int
    masked: bool = False
    """Whether the attention takes a mask even where nothing is filled up, as for the other lengths."""


def more_rows(tensor: Tensor, batch: int) -> Tensor:
    """Repeats the last row until there are `batch`."""
    missing = batch - tensor.shape[0]
    if missing <= 0:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


def decoding_inputs(
    prepare: Callable[..., dict[str, Any]], batch: int, input_ids: Tensor, given: dict[str, Any]
) -> dict[str, Any]:
    """The model's inputs for one step of decoding, filled up to `batch` rows."""
    input_ids = input_ids[:, -1:]  # all that `prepare` reads of it
    filled = {name: _rows_of(name, value, batch) for name, value in given.items()}
    return prepare(more_rows(input_ids, batch), **filled)


def _rows_of(name: str, value: Any, batch: int) -> Any:
    return more_rows(value, batch) if name in PADDED and isinstance(value, Tensor) else value


def prompt_inputs(
    prepare: Callable[..., dict[str, Any]],
    prompt: Prompt,
    cache: int,
    input_ids: Tensor,
    given: dict[str, Any],
) -> dict[str, Any]:
    """The model's inputs for a prompt, filled up; `cache` is the length of its cache."""
    missing = prompt.filled - prompt.length
    mask = given.get("attention_mask")
    positions = given.get("position_ids")
    filled = {name: _rows_of(name, value, prompt.batch) for name, value in given.items()}
    filled.pop("next_sequence_length", None)
    input_ids = more_rows(input_ids, prompt.batch)
    if mask is None and not missing and not prompt.masked:
        return prepare(input_ids, **filled)
    if missing:
        # Positions that go on: repeated ones would be taken for the beginning of another sequence.
        input_ids = torch.cat([input_ids, input_ids[:, -1:].expand(-1, missing)], dim=1)
        if positions is not None:
            further = torch.arange(1, missing + 1, dtype=positions.dtype, device=positions.device)
            last = filled["position_ids"][:, -1:]
            filled["position_ids"] = torch.cat([filled["position_ids"], last + further], dim=1)
        if mask is not None:
            ones = filled["attention_mask"].new_ones(prompt.batch, missing)
            filled["attention_mask"] = torch.cat([filled["attention_mask"], ones], dim=1)
    made = prepare(input_ids, **filled)
    source = _sources(more_rows(mask, prompt.batch) if mask is not None else None, prompt, input_ids.device)
    return _repeated(made, source, prompt, cache)


def _sources(mask: Tensor | None, prompt: Prompt, device: torch.device) -> Tensor:
    """For each position `[B, P]`, or `[1, P]`, the one that it repeats: itself, or the last of the prompt."""
    places = torch.arange(prompt.filled, dtype=torch.int64, device=device)[None]
    last = prompt.length - 1
    beyond = places > last
    if mask is not None:
        # Only what stands before the first token of a row: behind it, the user's mask means what it says.
        before = mask.cumsum(dim=1) == 0
        before = torch.nn.functional.pad(before, (0, prompt.filled - prompt.length))
        beyond = beyond | before
    return torch.where(beyond, last, places)


def _repeated(made: dict[str, Any], source: Tensor, prompt: Prompt, cache: int) -> dict[str, Any]:
    """The inputs with every position that fills up as a copy of the one that it repeats."""
    repeated = dict(made)
    for name in ("input_ids", "position_ids"):
        tensor = made.get(name)
        if isinstance(tensor, Tensor):
            repeated[name] = tensor.gather(1, source.expand(tensor.shape[0], -1))
    mask = made.get("attention_mask")
    if isinstance(mask, dict):
        repeated["attention_mask"] = {
            kind: _repeated_mask(each, source, prompt, cache) for kind, each in mask.items()
        }
    elif (made_mask := _repeated_mask(mask, source, prompt, cache)) is not None:
        repeated["attention_mask"] = made_mask  # absent, as for other prompts, where there is none
    return repeated


def _repeated_mask(mask: Tensor | None, source: Tensor, prompt: Prompt, cache: int) -> Tensor | None:
    if mask is None and prompt.length == 1 and not prompt.masked:
        return None  # copies of the only token attend to copies alone, which is the same
    if mask is None:
        # Attention that would be causal by its kernel alone: what fills up must not see what fills up.
        seen = torch.arange(cache, dtype=torch.int64, device=source.device) <= source[0][:, None]
        return seen.expand(prompt.batch, 1, -1, -1).contiguous()  # as a gathered one is
    rows = max(source.shape[0], mask.shape[0])
    whole = mask.expand(rows, -1, -1, -1)
    index = source.expand(rows, -1)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
    return whole.gather(2, index)
