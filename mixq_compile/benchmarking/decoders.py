"""Decoders by configuration, with random weights and planted outliers, and one layer of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.benchmarking.planted import generator, planted_columns
from mixq_compile.benchmarking.shapes import ModelShape

SMALLEST_GAIN, LARGEST_GAIN = 8.0, 40.0
"""Gains of outlier channels: log-spaced, as the channel maxima of trained models roughly are."""
PART_OF_CHANNELS = 1 / 256
"""How many channels are outliers: 16 of 4096."""
MASKLESS = "mixq_maskless"
"""Name of the attention without masks: transformers makes none for names that it does not know."""
INNER_DEVIATION = 0.5
"""Standard deviation of values, gates and MLP channels, so that only planted channels exceed 6."""


def build_decoder(
    shape: ModelShape, layers: int, positions: int, dtype: torch.dtype, device: torch.device
) -> Any:
    """A causal language model of this shape on the device, random but the same in every call."""
    config = shape.config(layers, positions)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    plant_outliers(model)
    return model


def plant_outliers(model: Any) -> None:
    """Gives a decoder outlier channels, in place.

    Norm weights are enlarged in a few channels (inputs of q/k/v and gate/up), and so are rows of
    up_proj (inputs of down_proj). What the norms feed is scaled down to ordinary sizes again.
    """
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        _enlarge(layer.input_layernorm.weight.data, 3 * number)
        _enlarge(layer.post_attention_layernorm.weight.data, 3 * number + 1)
        _settle(attention.v_proj.weight.data, layer.input_layernorm.weight)
        for projection in (mlp.gate_proj, mlp.up_proj):
            _settle(projection.weight.data, layer.post_attention_layernorm.weight)
        _enlarge(mlp.up_proj.weight.data, 3 * number + 2)


def _enlarge(values: Tensor, seed: int) -> None:
    """Multiplies some rows of values by log-spaced gains."""
    count = max(1, math.floor(values.shape[0] * PART_OF_CHANNELS))
    rows = list(planted_columns(values.shape[0], count, seed))
    gains = torch.logspace(
        math.log10(SMALLEST_GAIN), math.log10(LARGEST_GAIN), count, dtype=torch.float32, device=values.device
    )
    values[rows] *= gains.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))


def _settle(weight: Tensor, norm: Tensor) -> None:
    """Scales a weight so that its outputs on normed inputs have `INNER_DEVIATION`."""
    expected = weight.float().std() * norm.float().norm()
    weight *= (INNER_DEVIATION / expected).to(weight.dtype)


def set_attention(model: Any, *, masked: bool) -> None:
    """Chooses whether a decoder's attention reads a mask, or is causal by its kernel alone.

    A cache that is longer than its content needs a mask. Without one, transformers would still make
    one under torch.compile, and a slower attention kernel would hide what the linears gain.
    """
    from transformers import AttentionInterface

    if masked:
        model.set_attn_implementation("sdpa")
        return
    AttentionInterface.register(MASKLESS, AttentionInterface()["sdpa"])
    model.set_attn_implementation(MASKLESS)


class OneLayer(nn.Module):
    """The first layer of a decoder, on hidden states `[B, T, H]`, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layer = model.model.layers[0]

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """The layer's output `[B, T, H]`; cosine and sine `[1, T, D]` are of the positions."""
        return self.layer(hidden, position_embeddings=(cosine, sine))  # type: ignore[no-any-return]


def layer_inputs(model: Any, batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and position embeddings for `OneLayer`."""
    weight = model.model.embed_tokens.weight
    hidden = torch.randn(
        batch, tokens, weight.shape[1],
        dtype=torch.float32, device=weight.device, generator=generator(weight.device, seed),
    ).to(weight.dtype)  # fmt: skip
    positions = torch.arange(tokens, dtype=torch.int64, device=weight.device)[None]
    cosine, sine = model.model.rotary_emb(hidden, position_ids=positions)
    return hidden, cosine, sine


def random_tokens(model: Any, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Tokens `[B, T]` int64."""
    device = model.model.embed_tokens.weight.device
    return torch.randint(
        1, model.config.vocab_size, (batch, tokens),
        dtype=torch.int64, device=device, generator=generator(device, seed),
    )  # fmt: skip
