"""Greedy text from a model, and where two such texts part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixq_compile.errors import OptionError
from mixq_compile.evaluation.scoring import (
    causal_logits,
    context_length,
    evaluation_mode,
    model_device,
    padded,
    rounded_up,
)

LENGTH_STEP = 64
"""A compiled model's input is padded to multiples of this, so that it meets few shapes."""


@dataclass(frozen=True)
class GenerationComparison:
    """How long two texts agree."""

    equal_tokens: int
    """Tokens from the start that are equal in both."""
    reference_tokens: int
    tokens: int
    """Tokens of the compared text."""

    @property
    def identical(self) -> bool:
        """True where neither text goes on after the equal tokens."""
        return self.equal_tokens == self.reference_tokens == self.tokens


def generate_text(
    model: Callable[..., Any], tokenizer: Any, prompt: str, max_new_tokens: int, **kwargs: Any
) -> str:
    """The text with which the model goes on after `prompt`, always taking the likeliest token.

    A model's own `generate` is used. A compiled model (`torch.compile(model)`) is called step by step
    on the whole text instead: its `generate` is that of the model inside and would not run the compiled
    graph for the prompt.

        >>> generate_text(model, tokenizer, "Once upon a time", 12)
        ', there was a little girl named Lily.'

    Args:
        model: a Hugging Face causal language model, compiled or not, or a callable as for `perplexity`.
        tokenizer: a Hugging Face tokenizer.
        prompt: the beginning; an empty one starts from BOS alone.
        max_new_tokens: most tokens to add; fewer where the model ends the text or its context is full.
        **kwargs: handed to `model.generate`.

    Raises:
        OptionError: `max_new_tokens` is not positive, the prompt has no token, or `kwargs` are given for
            a model without a `generate` of its own.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise OptionError(f"max_new_tokens must be a positive whole number, not {max_new_tokens!r}.")
    prompt_tokens = list(tokenizer(prompt)["input_ids"])
    if not prompt_tokens:
        raise OptionError("the prompt has no token, and the tokenizer adds none: give a longer prompt.")
    own_generate = getattr(model, "generate", None)
    # A bound method of another object is that of the module inside a wrapper.
    if own_generate is not None and getattr(own_generate, "__self__", model) is model:
        tokens = _generate(model, tokenizer, prompt_tokens, max_new_tokens, kwargs)
    elif kwargs:
        raise OptionError(f"{type(model).__name__} has no generate of its own to take {', '.join(kwargs)}.")
    else:
        tokens = _step_by_step(model, tokenizer, prompt_tokens, max_new_tokens)
    # Both decoded from the start: on its own, the new part would lose its leading space.
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    text: str = whole.removeprefix(tokenizer.decode(prompt_tokens, skip_special_tokens=True))
    return text


def compare_generation(reference_text: str, text: str, tokenizer: Any | None = None) -> GenerationComparison:
    """Counts the tokens that are equal until the two texts part.

        >>> compare_generation("a cat sat", "a cat ran").equal_tokens
        2

    Args:
        reference_text: what the original model wrote.
        text: what the other model wrote.
        tokenizer: whose tokens are counted; without one, words with the white space before them.
    """
    if tokenizer is None:
        reference: Sequence[Any] = re.findall(r"\s*\S+", reference_text)
        other: Sequence[Any] = re.findall(r"\s*\S+", text)
    else:
        reference = tokenizer(reference_text, add_special_tokens=False)["input_ids"]
        other = tokenizer(text, add_special_tokens=False)["input_ids"]
    equal = 0
    for wanted, got in zip(reference, other, strict=False):
        if wanted != got:
            break
        equal += 1
    return GenerationComparison(equal, len(reference), len(other))


def _generate(
    model: Any, tokenizer: Any, prompt_tokens: list[int], max_new_tokens: int, kwargs: dict[str, Any]
) -> list[int]:
    ids = torch.tensor([prompt_tokens], dtype=torch.int64, device=model_device(model))
    options = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    with evaluation_mode(model):
        tokens: list[int] = model.generate(ids, **(options | kwargs))[0].tolist()
    return tokens


def _step_by_step(
    model: Callable[..., Any], tokenizer: Any, prompt_tokens: list[int], max_new_tokens: int
) -> list[int]:
    device = model_device(model)
    context = context_length(model)
    tokens = list(prompt_tokens)
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            if context is not None and len(tokens) >= context:
                break
            length = rounded_up(len(tokens), LENGTH_STEP, context or len(tokens) + LENGTH_STEP)
            ids = torch.tensor([padded(tokens, length)], dtype=torch.int64, device=device)
            tokens.append(int(causal_logits(model, ids)[0, len(tokens) - 1].argmax()))
            if tokens[-1] in _end_tokens(model, tokenizer):
                break
    return tokens


def _end_tokens(model: Callable[..., Any], tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())
