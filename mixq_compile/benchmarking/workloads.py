"""What a model is asked to do: prefill, decode with a cache, or one token without a cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixq_compile.benchmarking.choices import DECODE, PREFILL, SINGLE
from mixq_compile.benchmarking.decoders import random_tokens
from mixq_compile.benchmarking.shapes import ModelShape
from mixq_compile.benchmarking.timing import PeerMissing

CACHE_STEP = 64
"""A cache's length is a multiple of this."""
CACHE_SHARE = 0.5
"""Part of the free memory that a cache may take: attention copies it where heads share keys."""


@dataclass(frozen=True)
class Workload:
    """One call of a model."""

    kind: str
    """`prefill`: many tokens into an empty static cache that they fill; `decode`: one token after `context`
    others in a static cache; `single`: one token without a cache, as MixQ's own benchmark calls a step."""
    batch: int
    tokens: int
    context: int = 0

    def __str__(self) -> str:
        if self.kind == PREFILL:
            return f"prefill {self.batch} × {self.tokens}"
        if self.kind == DECODE:
            return f"decode {self.batch} after {self.context}"
        return f"one token without cache, {self.batch}"


@dataclass(frozen=True)
class Inputs:
    """What a model is called with."""

    given: Mapping[str, Any]
    reset: Callable[[], object]
    """Brings the cache back to its length before the call."""
    cache_bytes: int


def make_inputs(
    workload: Workload, model: Any, shape: ModelShape, layers: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """Random tokens, and for decoding a cache of random content in this dtype.

    Raises PeerMissing where the cache does not fit the free memory.
    """
    given: dict[str, Any] = {
        "input_ids": random_tokens(model, workload.batch, workload.tokens),
        "logits_to_keep": 1,
    }
    if workload.kind == SINGLE:
        return Inputs({**given, "use_cache": False}, lambda: None, 0)
    length = workload.context + workload.tokens
    if workload.kind == DECODE:
        # A prefill fills its cache to the last place: only then attention needs no mask.
        length = (length + CACHE_STEP - 1) // CACHE_STEP * CACHE_STEP
    per_token = 2 * layers * shape.key_value_heads * shape.head_size * dtype.itemsize
    needed = per_token * length * workload.batch
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if needed > CACHE_SHARE * free:
            raise PeerMissing(
                f"its cache takes {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
            )
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)
    cache.early_initialization(
        batch_size=workload.batch, num_heads=shape.key_value_heads, head_dim=shape.head_size, dtype=dtype,
        device=device,
    )  # fmt: skip
    layers_of_cache: list[Any] = list(cache.layers)
    for layer in layers_of_cache:
        layer.keys.normal_()
        layer.values.normal_(std=0.5)

    def reset() -> None:
        for layer in layers_of_cache:
            layer.cumulative_length.fill_(workload.context)

    return Inputs({**given, "past_key_values": cache, "use_cache": True}, reset, needed)
