"""Runs a causal language model over windows of tokens and adds up what its scored tokens cost."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import OptionError
from mixq_compile.evaluation.protocols import Window

TARGETS_AT_ONCE = 512
"""Rows of logits turned into fp32 together: bounds memory at a vocabulary of 128 thousand."""


def total_nll(
    model: Callable[..., Any],
    windows: Sequence[Window],
    *,
    batch_size: int = 1,
    pad_to: int | None = None,
    longest: int,
    progress: bool = True,
) -> float:
    """The sum over all scored tokens of their negative log likelihood, in nats.

    Cross-entropy in fp32, summed in float64. The model runs without gradients in eval mode; training
    flags are restored.

    Args:
        model: called as `model(ids)` with int64 ids `[B, T]`; see `causal_logits`.
        windows: what to read and to score.
        batch_size: windows run together; shorter ones are padded on the right, which a causal model
            cannot see.
        pad_to: pads every length to a multiple of this, and every batch to `batch_size`, so that a
            compiled model meets few shapes.
        longest: no padding beyond so many tokens.
        progress: shows a bar on stderr where that is a terminal.
    """
    device = model_device(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    batches = batched(windows, batch_size, pad_to, longest)
    with evaluation_mode(model):
        for batch, length in _with_progress(batches, progress):
            rows = batch if pad_to is None else [*batch, *batch[:1] * (batch_size - len(batch))]
            ids = torch.tensor(
                [padded(window.tokens, length) for window in rows], dtype=torch.int64, device=device
            )
            logits = causal_logits(model, ids)
            for row, window in enumerate(batch):
                total += _window_nll(logits[row], ids[row], window)
    return float(total)


def padded(tokens: Sequence[int], length: int) -> list[int]:
    """The tokens, repeated from the start until there are `length` of them.

    Repeating real text, not a pad token: a model quantized online looks for outliers in these rows
    too, and a token that training never showed could bring columns that no text has.
    """
    repeats = -(-length // len(tokens))
    return (list(tokens) * repeats)[:length]


def rounded_up(length: int, multiple: int | None, longest: int) -> int:
    """The length to pad to: the next multiple, but no more than `longest` (nor less than `length`)."""
    if multiple is None:
        return length
    return max(length, min(-(-length // multiple) * multiple, longest))


def causal_logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Logits `[B, T, vocabulary]` of ids `[B, T]`, without a cache where the model offers the choice.

    The model may return them, a tuple that starts with them, or an object with `logits`.
    """
    output = model(ids, use_cache=False) if _takes_use_cache(model) else model(ids)
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def model_device(model: Callable[..., Any]) -> torch.device:
    """Where the model's first parameter lives; the CPU for a callable without parameters.

    Raises OptionError for a model on the meta device.
    """
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None:
        return torch.device("cpu")
    if parameter.is_meta:
        raise OptionError(f"{type(model).__name__} is on the meta device: load its weights first.")
    return parameter.device


def context_length(model: Callable[..., Any]) -> int | None:
    """The most tokens the model can read, `config.max_position_embeddings`; None where it does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


@contextmanager
def evaluation_mode(model: Callable[..., Any]) -> Iterator[None]:
    """Eval mode without gradients; restores the training flag of every module."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [(module, module.training) for module in modules]
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def batched(
    windows: Sequence[Window], batch_size: int, pad_to: int | None, longest: int
) -> list[tuple[list[Window], int]]:
    """Batches with the length to pad them to.

    Windows of one padded length run together, so that with `pad_to` every batch has one of few shapes.
    """
    if batch_size == 1:
        return [([window], rounded_up(len(window.tokens), pad_to, longest)) for window in windows]
    ordered = sorted(windows, key=lambda window: len(window.tokens))
    groups: dict[int, list[Window]] = defaultdict(list)
    for window in ordered:
        groups[rounded_up(len(window.tokens), pad_to, longest) if pad_to else 0].append(window)
    return [
        (group[start : start + batch_size], length or len(group[start : start + batch_size][-1].tokens))
        for length, group in groups.items()
        for start in range(0, len(group), batch_size)
    ]


def _window_nll(logits: Tensor, ids: Tensor, window: Window) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(window.first_scored, len(window.tokens), TARGETS_AT_ONCE):
        end = min(start + TARGETS_AT_ONCE, len(window.tokens))
        losses = nn.functional.cross_entropy(
            logits[start - 1 : end - 1].float(), ids[start:end], reduction="none"
        )
        total += losses.double().sum()
    return total


def _takes_use_cache(model: Callable[..., Any]) -> bool:
    try:
        return "use_cache" in inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        return False


def _with_progress(batches: Sequence[Any], progress: bool) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    return track(batches, "Scoring", console=console, transient=True, disable=hidden)
