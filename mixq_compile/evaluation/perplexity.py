"""Perplexity of a causal language model on a text, by one of four published protocols."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import OptionError
from mixq_compile.evaluation.protocols import Protocol, Window, get_protocol
from mixq_compile.evaluation.scoring import context_length, total_nll

SMALLEST_WINDOW = 4


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity with everything that a comparison needs to agree on."""

    protocol: str
    window: int
    """Tokens read together, at most."""
    tokens_scored: int
    nll: float
    """Negative log likelihood of all scored tokens together, in nats."""
    perplexity: float
    """exp(nll / tokens_scored)."""
    text_sha256: str
    """Of the whole text given, in UTF-8."""
    documents: int
    """Windows or stories scored."""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} ({self.protocol}, window {self.window}, "
            f"{self.tokens_scored} tokens in {self.documents} documents, "
            f"text sha256 {self.text_sha256[:12]}…)"
        )


def perplexity(
    model: Callable[..., Any],
    tokenizer: Any,
    text: str,
    protocol: str = "gptq",
    limit: int | None = None,
    window: int | None = None,
    progress: bool = True,
    *,
    batch_size: int = 1,
    pad_to: int | None = None,
) -> PerplexityResult:
    """The perplexity of `model` on `text`.

        >>> text = Path("wiki.test.raw").read_text(encoding="utf-8")
        >>> print(perplexity(model, tokenizer, text, protocol="gptq"))
        perplexity 5.4721 (gptq, window 2048, 339802 tokens in 166 documents, text sha256 173c87a53759…)
        >>> fast = torch.compile(model, backend="mixq", dynamic=False)
        >>> perplexity(fast, tokenizer, stories, protocol="stories", pad_to=128)

    `pad_to` and `batch_size` pad on the right with tokens that are never scored and that a causal model
    cannot see: a floating-point model's result stays the same but for the rounding of another matrix
    shape. A model quantized with online outliers does see the padding rows, as it sees other requests.

    Args:
        model: called as `model(ids)` with int64 ids `[B, T]`, returns logits `[B, T, vocabulary]` or an
            object with `logits`, as a Hugging Face causal language model, compiled or not.
        tokenizer: a Hugging Face tokenizer.
        text: the raw file's text; for `stories`, stories separated by `<|endoftext|>`.
        protocol: `gptq`, `llamacpp` or `stories`.
        limit: scores the first so many windows or stories only.
        window: tokens read together. None: 2048 for `gptq`, 512 for `llamacpp` and `windows`, cut to the
            model's context where that is shorter; the context for `stories`.
        progress: shows a bar on stderr where that is a terminal.
        batch_size: windows run together.
        pad_to: pads lengths to multiples of this, so that a compiled model meets at most
            `window / pad_to` shapes and is not compiled anew for every length.

    Raises:
        OptionError: unknown protocol; a limit, window or other number out of range; a window beyond the
            model's context; too little text; a model without values.
    """
    for name, value in {"batch_size": batch_size, "pad_to": pad_to}.items():
        _check_positive(name, value)
    windows, tokens = perplexity_windows(model, tokenizer, text, protocol, limit, window)
    nll = total_nll(model, windows, batch_size=batch_size, pad_to=pad_to, longest=tokens, progress=progress)
    scored = sum(part.scored for part in windows)
    return PerplexityResult(
        protocol=protocol,
        window=tokens,
        tokens_scored=scored,
        nll=nll,
        perplexity=_exp(nll / scored),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        documents=len(windows),
    )


def perplexity_windows(
    model: Callable[..., Any],
    tokenizer: Any,
    text: str,
    protocol: str = "gptq",
    limit: int | None = None,
    window: int | None = None,
) -> tuple[list[Window], int]:
    """The windows of a text that `perplexity` scores, and how many tokens one has at most.

    Raises OptionError as `perplexity` does.
    """
    chosen = get_protocol(protocol)
    _check_positive("limit", limit)
    tokens = _window(model, chosen, window)
    return chosen.windows(tokenizer, text, tokens, limit), tokens


def _check_positive(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise OptionError(f"{name} must be a positive whole number, not {value!r}.")


def _window(model: Callable[..., Any], protocol: Protocol, window: int | None) -> int:
    context = context_length(model)
    if window is None:
        sizes = [size for size in (protocol.default_window, context) if size is not None]
        if not sizes:
            raise OptionError(
                f"protocol {protocol.name!r} reads as many tokens as the model's context, and the model has "
                "no config.max_position_embeddings: give window=."
            )
        return min(sizes)
    if isinstance(window, bool) or not isinstance(window, int) or window < SMALLEST_WINDOW:
        raise OptionError(f"window must be a whole number of tokens from {SMALLEST_WINDOW}, not {window!r}.")
    if context is not None and window > context:
        raise OptionError(f"window {window} is longer than the model's context of {context} tokens.")
    return window


def _exp(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
