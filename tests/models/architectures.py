"""Tiny transformers models by configuration, and what each route of mixq does to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    inputs: Callable[[], dict[str, Any]]
    output: str = "logits"

    def build(self) -> nn.Module:
        """The model with random weights, the same in every call."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.settings)
        model: nn.Module = getattr(transformers, self.model)(config)
        return model.eval().requires_grad_(False)


def _ids(rows: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def _text() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _causal() -> dict[str, Any]:
    return {"input_ids": _ids(), "use_cache": False}


def _both() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(length=8, seed=2), "use_cache": False}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


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
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the three routes made of one architecture."""

    architecture: str
    found: int
    quantized: int
    skipped: dict[str, int]
    """Reasons why linears were left alone, with how many."""
    sqnr: dict[str, float]
    """dB, by route."""

    def __str__(self) -> str:
        figures = "  ".join(f"{route} {self.sqnr[route]:.2f} dB" for route in ROUTES)
        left = "; ".join(f"{count} x {reason}" for reason, count in self.skipped.items()) or "none"
        return (
            f"{self.architecture:28} {self.quantized}/{self.found} quantized  {figures}  left alone: {left}"
        )


def _value(architecture: Architecture, output: Any) -> Tensor:
    found: Tensor = getattr(output, architecture.output)
    return found


def outcome_of(architecture: Architecture, lowering: str = "eager") -> Outcome:
    """Runs one architecture through all routes."""
    inputs = architecture.inputs()
    model = architecture.build()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = _value(architecture, model(**inputs))
        fast = torch.compile(model, backend="mixq", options={"force": True, "lowering": lowering})
        compiled = _value(architecture, fast(**inputs))
        report = mixq.report(fast)
        program = mixq.capture(model, inputs)
        rewritten, _ = mixq.compile(program, "aot", force=True)
        exported = _value(architecture, rewritten.module()(**inputs))
        swapped = _value(architecture, mixq.quantize(copy.deepcopy(model))(**inputs))
    skipped: dict[str, int] = {}
    for linear in report.skipped:
        skipped[linear.skip or ""] = skipped.get(linear.skip or "", 0) + 1
    return Outcome(
        architecture.name,
        len(report.linears),
        len(report.quantized),
        skipped,
        {
            "backend": sqnr(reference, compiled),
            "quantize": sqnr(reference, swapped),
            "export": sqnr(reference, exported),
        },
    )
