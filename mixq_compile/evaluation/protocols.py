"""The perplexity protocols: which tokens a model reads together, and which of them are scored.

Perplexities of different protocols, windows or texts do not compare.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import OptionError, unknown_name

STORY_SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Window:
    """Tokens that the model reads together; each scored one is predicted from all before it."""

    tokens: tuple[int, ...]
    first_scored: int
    """Place of the first scored token, at least 1; all after it are scored too."""

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return len(self.tokens) - self.first_scored


@dataclass(frozen=True)
class Protocol:
    """One way to cut a text into windows."""

    name: str
    summary: str
    default_window: int | None
    """Tokens of a window; None: the model's context."""
    windows: Callable[[Any, str, int, int | None], list[Window]]
    """From tokenizer, text, window and limit."""


def get_protocol(name: str) -> Protocol:
    """The protocol of this name. Raises OptionError that lists the valid names."""
    if name not in PROTOCOLS:
        raise unknown_name("perplexity protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def wikitext_rows(text: str) -> list[str]:
    """The rows of WikiText as Hugging Face's data set has them, from the text of the raw file.

    A row is a line with its newline; a blank line (`" \\n"`) is an empty row.
    """
    return [line if line.strip() else "" for line in io.StringIO(text)]


def gptq_windows(tokenizer: Any, text: str, window: int, limit: int | None) -> list[Window]:
    """The rows joined by blank lines, tokenized once with one BOS, cut into windows; the rest is dropped.

    All tokens of a window but its first are scored. Source: the evaluation of GPTQ's repository.
    """
    tokens = _with_bos(tokenizer, "\n\n".join(wikitext_rows(text)))
    return [Window(part, 1) for part in _cut(tokens, window, limit)]


def llamacpp_windows(tokenizer: Any, text: str, window: int, limit: int | None) -> list[Window]:
    """The text as it is, tokenized once, cut into windows whose first token is replaced by BOS.

    Only the second half is scored: of 512 tokens the last 255. Source: `perplexity` of llama.cpp, and
    its copy in AutoGPTQ.
    """
    tokens = _with_bos(tokenizer, text)
    bos = _bos(tokenizer)
    first_scored = window // 2 + 1
    return [Window((*bos, *part[len(bos) :]), first_scored) for part in _cut(tokens, window, limit)]


def bos_windows(tokenizer: Any, text: str, window: int, limit: int | None) -> list[Window]:
    """The lines joined by blank lines, tokenized once, cut into windows that each begin with BOS.

    All tokens of a window but BOS are scored. For models that are lost without BOS, such as Gemma; of a
    tokenizer that has none the first token of a window stands in its place.
    """
    tokens = _with_bos(tokenizer, "\n\n".join(text.split("\n")))
    bos = _bos(tokenizer)
    parts = _cut(tokens[len(bos) :], window - len(bos), limit)
    return [Window((*bos, *part), 1) for part in parts]


def story_windows(tokenizer: Any, text: str, window: int, limit: int | None) -> list[Window]:
    """Each story on its own, BOS first, truncated to the window; all tokens but the first are scored.

    Stories are separated by `<|endoftext|>`; white space around one is dropped.
    """
    stories = [story.strip() for story in text.split(STORY_SEPARATOR)]
    windows = []
    for story in [story for story in stories if story][:limit]:
        tokens = _with_bos(tokenizer, story)[:window]
        if len(tokens) > 1:
            windows.append(Window(tuple(tokens), 1))
    if not windows:
        raise OptionError("the text holds no story with a token to score.")
    return windows


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("gptq", "windows of 2048 without overlap; the standard", 2048, gptq_windows),
        Protocol("llamacpp", "windows of 512, second half scored", 512, llamacpp_windows),
        Protocol("windows", "windows of 512 that each begin with BOS, all else scored", 512, bos_windows),
        Protocol("stories", f"each text between {STORY_SEPARATOR} on its own", None, story_windows),
    )
}
"""Every protocol by name."""


def _bos(tokenizer: Any) -> list[int]:
    """The BOS token; nothing where the tokenizer has none, as Qwen's."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _with_bos(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the warning that the text is longer than the context is wrong here, it gets cut.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [*_bos(tokenizer), *encoded]


def _cut(tokens: list[int], window: int, limit: int | None) -> list[tuple[int, ...]]:
    count = len(tokens) // window
    if count == 0:
        raise OptionError(
            f"the text has {len(tokens)} tokens, less than one window of {window}: "
            f"give more text, or window={len(tokens)} or less."
        )
    starts = range(0, count * window, window)[:limit]
    return [tuple(tokens[start : start + window]) for start in starts]
