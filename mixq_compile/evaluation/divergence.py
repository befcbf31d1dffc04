"""How far other models are from a reference, window by window: perplexity, KL divergence, top-1 agreement.

All models read one window after the other, and what their logits say is added up at once: logits of a whole
text would take gigabytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import OptionError
from mixq_compile.evaluation.protocols import Window
from mixq_compile.evaluation.scoring import (
    TARGETS_AT_ONCE,
    batched,
    causal_logits,
    evaluation_mode,
    model_device,
    padded,
)

REFERENCE = ""
"""The label of the reference among the scores."""


@dataclass(frozen=True)
class WindowScore:
    """What one model's logits of one window say; sums over its scored tokens."""

    tokens: int
    nll: float
    """Negative log likelihood, in nats."""
    kl: float
    """Σ KL(reference ‖ model) over the vocabulary, in nats; 0 for the reference."""
    agreeing: int
    """Tokens for which model and reference think the same one most likely."""
    signal: float
    """Σ logits² of the reference."""
    noise: float
    """Σ of the squared differences from them."""
    seconds: float
    """Of the model's call."""


@dataclass(frozen=True)
class Divergence:
    """A model on a text, beside the reference on the same windows."""

    perplexity: float
    perplexity_error: float | None
    """Its standard error over windows; None for fewer than two."""
    delta: float
    """Perplexity over that of the reference, minus 1: 0.01 is one percent."""
    delta_error: float | None
    """Standard error of `delta`, over windows: the text's own spread cancels."""
    kl: float
    """Mean KL divergence of a token's distribution from the reference's, in nats."""
    top1: float
    """Share of tokens for which both think the same one most likely."""
    sqnr_db: float
    """Signal-to-noise ratio of the logits."""
    tokens: int
    seconds: float
    """Median of a window's call."""
    windows: int = field(default=0)


@torch.no_grad()
def scores(
    reference: Callable[..., Any],
    models: Mapping[str, Callable[..., Any]],
    windows: Sequence[Window],
    *,
    batch_size: int = 1,
) -> Iterator[dict[str, list[WindowScore]]]:
    """The scores of the windows of one batch after the other, by label; the reference's under REFERENCE.

    Args:
        reference: called as `model(ids)` with int64 ids `[B, T]`, as `perplexity` says.
        models: by label; called the same way, each on its own device.
        windows: of a protocol.
        batch_size: windows run together; shorter ones are padded on the right, which a causal model cannot
            see.

    Raises OptionError where a model is labelled as the reference is.
    """
    if REFERENCE in models:
        raise OptionError("a model without a label would be taken for the reference: name each.")
    longest = max((len(window.tokens) for window in windows), default=0)
    for batch, length in batched(windows, batch_size, None, longest):
        wanted, seconds = _logits(reference, batch, length)
        found = {REFERENCE: _scores(wanted, wanted, batch, seconds)}
        for label, model in models.items():
            got, seconds = _logits(model, batch, length)
            found[label] = _scores(wanted, got.to(wanted.device), batch, seconds)
        yield found


def _logits(model: Callable[..., Any], batch: Sequence[Window], length: int) -> tuple[Tensor, float]:
    """The logits `[B, T, vocabulary]` of some windows, and how long they took."""
    device = model_device(model)
    rows = [padded(window.tokens, length) for window in batch]
    ids = torch.tensor(rows, dtype=torch.int64, device=device)
    with evaluation_mode(model):
        begin = time.perf_counter()
        logits = causal_logits(model, ids)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits, time.perf_counter() - begin


def _scores(wanted: Tensor, got: Tensor, batch: Sequence[Window], seconds: float) -> list[WindowScore]:
    each = seconds / len(batch)
    return [
        _score(wanted[row], got[row], window, each, is_reference=got is wanted)
        for row, window in enumerate(batch)
    ]


def _score(wanted: Tensor, got: Tensor, window: Window, seconds: float, *, is_reference: bool) -> WindowScore:
    nll = kl = signal = noise = 0.0
    agreeing = 0
    targets = torch.tensor(window.tokens, dtype=torch.int64, device=wanted.device)
    for start in range(window.first_scored, len(window.tokens), TARGETS_AT_ONCE):
        end = min(start + TARGETS_AT_ONCE, len(window.tokens))
        exact, own = (logits[start - 1 : end - 1].float() for logits in (wanted, got))
        expected, found = (nn.functional.log_softmax(logits, dim=-1) for logits in (exact, own))
        nll += float(nn.functional.nll_loss(found, targets[start:end], reduction="none").double().sum())
        if not is_reference:
            kl += float((expected.exp() * (expected - found)).sum(dim=-1).double().sum())
            noise += float((own - exact).square().sum(dim=-1).double().sum())
        agreeing += int((exact.argmax(dim=-1) == own.argmax(dim=-1)).sum())
        signal += float(exact.square().sum(dim=-1).double().sum())
    return WindowScore(window.scored, nll, kl, agreeing, signal, noise, seconds)


def divergence(reference: Sequence[WindowScore], model: Sequence[WindowScore]) -> Divergence:
    """What the scores of a model say, beside those of the reference on the same windows.

    The reference itself is as far from itself as its own scores say: not at all. Raises OptionError where
    the windows are not the same.
    """
    if not model or [score.tokens for score in reference] != [score.tokens for score in model]:
        raise OptionError("a model can be compared on the windows that the reference has read, and on all.")
    tokens = sum(score.tokens for score in model)
    own, exact = ([score.nll / score.tokens for score in each] for each in (model, reference))
    mean, wanted = sum(score.nll for score in model), sum(score.nll for score in reference)
    perplexity, ratio = _exp(mean / tokens), _exp((mean - wanted) / tokens)
    spread = _standard_error(own)
    paired = _standard_error([a - b for a, b in zip(own, exact, strict=True)])
    noise, signal = sum(score.noise for score in model), sum(score.signal for score in model)
    return Divergence(
        perplexity=perplexity,
        perplexity_error=None if spread is None else perplexity * spread,
        delta=ratio - 1,
        delta_error=None if paired is None else ratio * paired,
        kl=sum(score.kl for score in model) / tokens,
        top1=sum(score.agreeing for score in model) / tokens,
        sqnr_db=_decibels(signal, noise),
        tokens=tokens,
        seconds=sorted(score.seconds for score in model)[len(model) // 2],
        windows=len(model),
    )


def _standard_error(means: Sequence[float]) -> float | None:
    """Of the mean of windows, which are as long as each other or nearly so."""
    if len(means) < 2:
        return None
    centre = sum(means) / len(means)
    variance = sum((mean - centre) ** 2 for mean in means) / (len(means) - 1)
    return math.sqrt(variance / len(means))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio != 0 else -math.inf


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
