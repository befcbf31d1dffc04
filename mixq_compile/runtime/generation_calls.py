"""Which models and which calls of `generate` run prepared, how long a call gets, and why one does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import OptionError

ATTENTIONS = ("sdpa", "eager")
"""Attention implementations of transformers that take a mask over a static cache."""
PLAIN_ARGUMENTS = (
    "assistant_model",
    "custom_generate",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "prefix_allowed_tokens_fn",
)
"""Arguments of `generate` that change how it runs."""
MODES = ("greedy_search", "sample")


@dataclass(frozen=True)
class CallShape:
    """Sizes of one call of `generate`."""

    rows: int
    """Sequences, those of `num_return_sequences` counted."""
    length: int
    """Tokens of the longest prompt."""
    total: int
    """Tokens of a sequence at most, with those that are generated."""
    returns_cache: bool


def check_model(model: nn.Module) -> None:
    """Raises OptionError where a model cannot be prepared, saying why."""
    reason = _why_not(model)
    if reason is not None:
        raise OptionError(
            f"a {type(model).__name__} cannot be prepared for generation: {reason}. "
            "Its generate() stays as it is."
        )


def _why_not(model: Any) -> str | None:
    if hasattr(model, "_orig_mod"):
        return "it was compiled by torch.compile: prepare the model inside, which compiles what gains by it"
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "generate", None)):
        return "it is no transformers model with generate()"
    if not callable(getattr(model, "prepare_inputs_for_generation", None)):
        return "it has no prepare_inputs_for_generation"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, and only decoders are prepared"
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        return "its layers lie on several devices"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ATTENTIONS:
        return f"its attention is {attention!r}: load it with attn_implementation='sdpa'"
    return None


def check_cache(layers: Any, model: nn.Module) -> None:
    """Raises OptionError where a model's cache keeps a window or other state."""
    from transformers.cache_utils import StaticLayer

    for number, layer in enumerate(layers):
        if type(layer) is not StaticLayer:
            raise OptionError(
                f"a {type(model).__name__} cannot be prepared for generation: layer {number} keeps a "
                f"{type(layer).__name__}, and only caches of whole sequences can be filled up and reused. "
                "Its generate() stays as it is."
            )


def shape_of_call(model: Any, inputs: Any, arguments: dict[str, Any]) -> tuple[CallShape | None, str | None]:
    """The sizes of a call of `generate`; or None, and why it runs plainly."""
    for name in PLAIN_ARGUMENTS:
        if arguments.get(name) is not None:
            return None, f"{name} was given"
    if model.training:
        return None, "the model is in training mode"
    own = {
        name: value
        for name, value in arguments.items()
        if name
        not in ("generation_config", "logits_processor", "stopping_criteria", "streamer", "synced_gpus")
        and name not in PLAIN_ARGUMENTS
    }
    config, model_inputs = model._prepare_generation_config(arguments.get("generation_config"), **own)
    reason = _why_plain(config, arguments)
    if reason is not None:
        return None, reason
    tokens = inputs if inputs is not None else model_inputs.get("input_ids")
    for name, value in model_inputs.items():
        if name not in ("input_ids", "attention_mask") and value is not None:
            return None, f"{name} was given"
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.numel() == 0:
        return None, "the prompt is no matrix of tokens"
    mask = model_inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
        return None, "the attention mask is not of the prompt's shape"
    rows, length = tokens.shape
    total = _total_length(model, config, arguments, length)
    if total <= length:
        return None, "no token is to be generated"
    returns = bool(config.return_dict_in_generate)
    if returns and config.cache_implementation is not None:
        return None, "the static cache is to be returned"
    return CallShape(rows * (config.num_return_sequences or 1), length, total, returns), None


def _why_plain(config: Any, arguments: dict[str, Any]) -> str | None:
    mode = getattr(config.get_generation_mode(None), "value", "")
    if mode not in MODES:
        return f"it decodes by {mode or 'another method'}"
    if config.disable_compile:
        return "disable_compile=True"
    if config.compile_config is not None:
        return "compile_config was given"
    if config.cache_implementation not in (None, "static"):
        return f"cache_implementation={config.cache_implementation!r}"
    if config.use_cache is False:
        return "use_cache=False"
    for name in ("output_attentions", "output_hidden_states", "prefill_chunk_size", "token_healing"):
        if getattr(config, name, None):
            return f"{name} was given"
    if config.guidance_scale not in (None, 1):
        return "guidance_scale runs the model twice"
    if arguments.get("synced_gpus"):
        return "synced_gpus=True"
    return None


def _total_length(model: Any, config: Any, arguments: dict[str, Any], length: int) -> int:
    """Tokens of a sequence at most, as `generate` works it out."""
    if config.max_new_tokens is not None:
        return int(length + config.max_new_tokens)
    given = arguments.get("generation_config")
    by_default = (
        arguments.get("max_length") is None
        and (given is None or given.max_length is None)
        and model.generation_config.max_length is None
    )
    if not by_default:
        return int(config.max_length)
    total = int(length + config.max_length)
    context = context_of(model)
    return total if context is None else min(total, context)


def context_of(model: Any) -> int | None:
    """The most tokens that a model's positions reach; None where it does not say."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def place_of(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where a model's weights lie, and their dtype."""
    return model.device, model.dtype
