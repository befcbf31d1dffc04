"""Tiny transformers models by configuration, and what each route of mixq does to them."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixq_compile as mixq
from mixq_compile.evaluation import sqnr

ROUTES = ("backend", "quantize", "export")
VOCABULARY = 128
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """One model: how to configure it, and what to feed it."""

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    """Settings that are a pair of a config's name and its settings stand for that config."""
    inputs: Callable[[], dict[str, Any]]
    output: str = "logits"
    without: dict[str, str] = field(default_factory=dict)
    """Routes that do not capture this model, and why."""

    def build(self) -> nn.Module:
        """The model with random weights, the same in every call."""
        import transformers

        torch.manual_seed(0)
        if not self.config:
            model: nn.Module = getattr(Torch, self.model)(**self.settings)
        else:
            model = getattr(transformers, self.model)(_config(self.config, self.settings))
        return model.eval().requires_grad_(False)


def _config(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    made = {key: _config(*value) if _is_config(value) else value for key, value in settings.items()}
    return getattr(transformers, name)(**made)


def _is_config(value: Any) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], str)


class Torch:
    """Models of torch.nn itself."""

    @staticmethod
    def encoder(width: int, heads: int, inner: int, layers: int) -> nn.Module:
        """An encoder whose own fast path reads the weights of its linears."""
        layer = nn.TransformerEncoderLayer(width, heads, inner, batch_first=True)
        return nn.TransformerEncoder(layer, layers)

    @staticmethod
    def flux(width: int, layers: int) -> nn.Module:
        """FLUX's single blocks, whose `proj_out` joins attention and feed-forward."""
        return Diffusion(SingleBlock, width, layers)

    @staticmethod
    def sd3(width: int, layers: int) -> nn.Module:
        """SD3's joint blocks, with a feed-forward of diffusers."""
        return Diffusion(JointBlock, width, layers)

    @staticmethod
    def region(kind: str, width: int) -> nn.Module:
        """A feed-forward of which a part runs in a region."""
        return Regional(kind, width)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, modulated, behind one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.proj_mlp = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(3 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(nn.functional.silu(time)).unsqueeze(1).chunk(3, -1)
        normal = self.norm(x) * (1 + scale) + shift
        attended = _attention(self.to_q(normal), self.to_k(normal), self.to_v(normal))
        both = torch.cat([attended, nn.functional.gelu(self.proj_mlp(normal))], -1)
        return x + gate * self.proj_out(both)


class JointBlock(nn.Module):
    """Attention, then a gated feed-forward whose gate is named so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.ff = nn.ModuleDict({"gate": nn.Linear(width, 2 * width), "up": nn.Linear(width, 2 * width)})
        self.proj_out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        normal = self.norm(x + time.unsqueeze(1))
        x = x + self.to_out[1](
            self.to_out[0](_attention(self.to_q(normal), self.to_k(normal), self.to_v(normal)))
        )
        return x + self.proj_out(nn.functional.silu(self.ff["gate"](x)) * self.ff["up"](x))


class Diffusion(nn.Module):
    """Patches in, blocks, patches out: the last `proj_out` is the head."""

    def __init__(self, block: Any, width: int, layers: int) -> None:
        super().__init__()
        self.x_embedder, self.time_embedder = nn.Linear(32, width), nn.Linear(32, width)
        self.transformer_blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, 32)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, time = self.x_embedder(hidden_states), self.time_embedder(timestep)
        for block in self.transformer_blocks:
            x = block(x, time)
        return self.proj_out(self.norm_out(x))


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int = 4) -> Tensor:
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Regional(nn.Module):
    """Four linears, the middle two in a region: under no_grad, under autocast, or checkpointed."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.up_proj = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.down_proj, self.last = nn.Linear(2 * width, width), nn.Linear(width, width)

    def _inner(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))

    def _region(self, x: Tensor) -> Tensor:
        if self.kind == "checkpoint":
            return checkpoint(self._inner, x, use_reentrant=False)  # type: ignore[no-any-return]
        with torch.no_grad() if self.kind == "no_grad" else torch.autocast("cpu", torch.bfloat16):
            return self._inner(x).float()

    def forward(self, src: Tensor) -> Tensor:
        return self.last(torch.relu(src + self._region(self.first(src))))  # type: ignore[no-any-return]


def _ids(rows: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _text() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _causal() -> dict[str, Any]:
    return {"input_ids": _ids(), "use_cache": False}


def _short() -> dict[str, Any]:
    return {"input_ids": _ids(length=8), "use_cache": False}


def _both() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(length=8, seed=2), "use_cache": False}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _image() -> dict[str, Any]:
    return {"pixel_values": _random(2, 3, 32, 32)}


def _larger_image() -> dict[str, Any]:
    return {"pixel_values": _random(1, 3, 64, 64)}


def _masked_image() -> dict[str, Any]:
    return {**_larger_image(), "pixel_mask": torch.ones(1, 64, 64, dtype=torch.long)}


def _sound() -> dict[str, Any]:
    return {"input_values": _random(2, 600)}


def _patches() -> dict[str, Any]:
    return {"hidden_states": _random(2, 16, 32), "timestep": _random(2, 32)}


def _vectors() -> dict[str, Any]:
    return {"src": _random(2, 12, 128)}


DETECTOR: dict[str, Any] = {
    "d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 8,
    "decoder_attention_heads": 8, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 5,
}  # fmt: skip
STATES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": VOCABULARY, "state_size": 8,
    "time_step_rank": 16,
}  # fmt: skip
ONE_OPERATOR = (
    "torch's fast path puts one operator for a whole layer into the graph, and its linears stay in 16 or 32 "
    "bit; torch.backends.mha.set_fastpath_enabled(False) before compiling brings them out"
)
STAGES = ["stage1", "stage2", "stage3", "stage4"]


ARCHITECTURES = (
    Architecture("Llama", "LlamaConfig", "LlamaForCausalLM", GROUPED, _causal),
    Architecture("Qwen2 (with bias)", "Qwen2Config", "Qwen2ForCausalLM", GROUPED, _causal),
    Architecture("Mistral", "MistralConfig", "MistralForCausalLM", GROUPED, _causal),
    Architecture("Gemma", "GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 32}, _causal),
    Architecture("Phi-3", "Phi3Config", "Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}, _causal),
    Architecture(
        "Falcon (parallel attention)", "FalconConfig", "FalconForCausalLM",
        {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
         "parallel_attn": True, "new_decoder_architecture": False}, _causal,
    ),
    Architecture(
        "GPT-2", "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}, _causal,
    ),
    Architecture("GPT-NeoX", "GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, _causal),
    Architecture(
        "OPT", "OPTConfig", "OPTForCausalLM",
        {"hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 128}, _causal,
    ),
    Architecture("BERT", "BertConfig", "BertModel", SMALL, _text, "last_hidden_state"),
    Architecture(
        "ViT", "ViTConfig", "ViTModel",
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 32, "patch_size": 8}, _image, "last_hidden_state",
    ),
    Architecture(
        "T5", "T5Config", "T5ForConditionalGeneration",
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4,
         "vocab_size": VOCABULARY, "decoder_start_token_id": 0}, _both,
    ),
    Architecture(
        "Mixtral", "MixtralConfig", "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, _causal,
    ),
    Architecture(
        "nn.TransformerEncoder", "", "encoder", {"width": 128, "heads": 4, "inner": 256, "layers": 2},
        _vectors, "", {"backend": ONE_OPERATOR},
    ),
    Architecture("DeBERTa", "DebertaConfig", "DebertaModel",
        {**SMALL, "num_hidden_layers": 1, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        _text, "last_hidden_state",
    ),
    Architecture(
        "WavLM", "WavLMConfig", "WavLMModel",
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
         "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}, _sound, "last_hidden_state",
    ),
    Architecture("Mamba", "MambaConfig", "MambaForCausalLM", STATES, _short),
    Architecture(
        "FalconMamba", "FalconMambaConfig", "FalconMambaForCausalLM", STATES, _short,
    ),
    Architecture(
        "Jamba", "JambaConfig", "JambaForCausalLM",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": VOCABULARY, "attn_layer_period": 2, "attn_layer_offset": 1,
         "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 16,
         "pad_token_id": 0}, _short,
    ),
    Architecture(
        "DETR", "DetrConfig", "DetrForSegmentation",
        {**DETECTOR, "backbone_config": ("ResNetConfig", {
            "embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
            "layer_type": "basic", "out_features": STAGES})}, _masked_image, "pred_masks",
    ),
    Architecture(
        "MaskFormer", "MaskFormerConfig", "MaskFormerForInstanceSegmentation",
        {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": ("DetrConfig", DETECTOR),
         "backbone_config": ("SwinConfig", {
             "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
             "window_size": 2, "out_features": STAGES})}, _masked_image, "masks_queries_logits",
    ),
    Architecture("FLUX-like blocks", "", "flux", {"width": 128, "layers": 2}, _patches, ""),
    Architecture("SD3-like blocks", "", "sd3", {"width": 128, "layers": 2}, _patches, ""),
    Architecture("a part under no_grad", "", "region", {"kind": "no_grad", "width": 128}, _vectors, ""),
    Architecture("a part under autocast", "", "region", {"kind": "autocast", "width": 128}, _vectors, ""),
    Architecture("a part in checkpoint", "", "region", {"kind": "checkpoint", "width": 128}, _vectors, ""),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the three routes made of one architecture."""

    architecture: str
    found: int
    quantized: int
    """By the route that found most linears: a compiled graph names none that torch calls no module for."""
    skipped: dict[str, int]
    """Reasons why linears were left alone, with how many; those of the swap alone begin with `quantize`."""
    sqnr: dict[str, float]
    """dB, by route."""
    without: dict[str, str]
    """Routes that do not capture the model, and why."""

    def __str__(self) -> str:
        figures = "  ".join(
            f"{route} {self.sqnr[route]:.2f} dB" if route in self.sqnr else f"{route} –" for route in ROUTES
        )
        left = "; ".join(f"{count} x {reason}" for reason, count in self.skipped.items()) or "none"
        return (
            f"{self.architecture:28} {self.quantized}/{self.found} quantized  {figures}  left alone: {left}"
        )


def _value(architecture: Architecture, output: Any) -> Tensor:
    found: Tensor = getattr(output, architecture.output) if architecture.output else output
    return found


def outcome_of(architecture: Architecture, lowering: str = "eager") -> Outcome:
    """Runs one architecture through all routes."""
    inputs = architecture.inputs()
    model = architecture.build()
    figures: dict[str, float] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = _value(architecture, model(**inputs))
        reports = []
        if "backend" not in architecture.without:
            fast = torch.compile(model, backend="mixq", options={"force": True, "lowering": lowering})
            figures["backend"] = sqnr(reference, _value(architecture, fast(**inputs)))
            reports.append(mixq.report(fast))
        if "export" not in architecture.without:
            with torch.enable_grad():  # as a user exports, so that regions stand in the program
                program = (
                    torch.export.export(model, (), inputs, strict=False)
                    if not architecture.config
                    else (mixq.capture(model, inputs))
                )
            rewritten, _ = mixq.compile(program, "aot", force=True)
            figures["export"] = sqnr(reference, _value(architecture, rewritten.module()(**inputs)))
        swapped = mixq.quantize(copy.deepcopy(model))
        figures["quantize"] = sqnr(reference, _value(architecture, swapped(**inputs)))
        reports.append(mixq.report(swapped))
    report = max(reports, key=lambda each: len(each.linears))
    skipped = Counter(linear.skip or "" for linear in report.skipped)
    known = {linear.fqn for linear in report.skipped}
    skipped.update(f"quantize: {linear.skip}" for linear in reports[-1].skipped if linear.fqn not in known)
    return Outcome(
        architecture.name,
        len(report.linears),
        len(report.quantized),
        dict(skipped),
        figures,
        architecture.without,
    )
