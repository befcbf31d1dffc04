"""Static key-value caches of several sizes that share one memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixq_compile.runtime import torch_compat


@dataclass(frozen=True)
class LayerShape:
    """What a layer of the cache keeps of one token of one sequence."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """Of a layer that has been used."""
        keys, values = layer.keys, layer.values
        return cls(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, keys.device)


class SharedCaches:
    """One `StaticCache` for each batch and length, all over the memory of the largest one met.

    Only one is in use at a time. Where a larger one is needed, the memory is replaced: what was compiled for
    the others goes on, and CUDA graphs over them are recorded again.
    """

    def __init__(self, config: Any, layers: list[LayerShape]) -> None:
        self._config = config
        self._layers = layers
        self._caches: dict[tuple[int, int], Any] = {}
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that all share."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._memory)

    def empty(self, batch: int, length: int) -> Any:
        """The cache for this batch and length, with nothing in it; the last one's content is gone."""
        with torch.inference_mode(False), torch.no_grad():
            if batch * length > self._tokens:
                self._replace_memory(batch * length)
            cache = self._caches.get((batch, length))
            if cache is None:
                cache = self._caches[batch, length] = self._made(batch, length)
                self._place(cache, batch, length)
            for layer in cache.layers:
                # Zeros, though all is masked: of what is not finite, a masked part is not finite either.
                layer.keys.zero_()
                layer.values.zero_()
                layer.cumulative_length.zero_()
        return cache

    def _replace_memory(self, tokens: int) -> None:
        self._memory = []
        for cache in self._caches.values():
            for layer, shape in zip(cache.layers, self._layers, strict=True):
                nothing = torch.empty(0, dtype=shape.dtype, device=shape.device)
                layer.keys = layer.values = nothing
        self._memory = [
            (
                torch.zeros(tokens * shape.heads * shape.key_width, dtype=shape.dtype, device=shape.device),
                torch.zeros(tokens * shape.heads * shape.value_width, dtype=shape.dtype, device=shape.device),
            )
            for shape in self._layers
        ]
        self._tokens = tokens
        for (batch, length), cache in self._caches.items():
            self._place(cache, batch, length)

    def _made(self, batch: int, length: int) -> Any:
        from transformers import StaticCache

        cache: Any = StaticCache(config=self._config, max_cache_len=1)
        for layer, shape in zip(cache.layers, self._layers, strict=True):
            keys = torch.empty(batch, shape.heads, 0, shape.key_width, dtype=shape.dtype, device=shape.device)
            values = torch.empty(
                batch, shape.heads, 0, shape.value_width, dtype=shape.dtype, device=shape.device
            )
            layer.lazy_initialization(keys, values)
            layer.max_cache_len = length
        return cache

    def _place(self, cache: Any, batch: int, length: int) -> None:
        for layer, shape, (keys, values) in zip(cache.layers, self._layers, self._memory, strict=True):
            layer.keys = _view(keys, batch, shape.heads, length, shape.key_width)
            layer.values = _view(values, batch, shape.heads, length, shape.value_width)
            torch_compat.mark_static_address(layer.keys)
            torch_compat.mark_static_address(layer.values)


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def rewind(cache: Any, length: int) -> None:
    """Lets a cache go on behind its first `length` tokens: what lies beyond is written over."""
    with torch.inference_mode(False), torch.no_grad():
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)


def own_copy(cache: Any, rows: int, config: Any) -> Any:
    """What a cache holds of the first `rows` sequences, as the `DynamicCache` that generate() returns."""
    from transformers import DynamicCache

    made = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        length = int(layer.cumulative_length)
        made.update(layer.keys[:rows, :, :length].clone(), layer.values[:rows, :, :length].clone(), number)
    return made
