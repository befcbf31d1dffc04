"""Tiny language models by configuration, and what quantizing them by module and by file gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.evaluation import sqnr
from mixq_compile.runtime.directory_plan import plan_directory
from mixq_compile.runtime.directory_quantization import DirectoryQuantization
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.options import MixqOptions

VOCABULARY = 128
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 32}
EXPERTS: dict[str, Any] = {
    **HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
}  # fmt: skip

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2": ("Llama", SMALL),
    "Llama-3": ("Llama", {**GROUPED, "rope_theta": 500000.0}),
    "Llama, tied head": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "Falcon (7B style)": ("Falcon", {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
        "parallel_attn": True, "new_decoder_architecture": False, "bos_token_id": 1, "eos_token_id": 2}),
    "Falcon (40B style)": ("Falcon", {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
        "vocab_size": VOCABULARY, "new_decoder_architecture": True, "bos_token_id": 1, "eos_token_id": 2}),
    "ChatGLM (GLM)": ("Glm", HEADS),
    "GLM-4": ("Glm4", HEADS),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen3": ("Qwen3", HEADS),
    "Qwen2-MoE": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS),
    "Gemma": ("Gemma", HEADS),
    "Gemma 2": ("Gemma2", HEADS),
    "Gemma 3": ("Gemma3Text", HEADS),
    "Mistral": ("Mistral", GROUPED),
    "Mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMo": ("Olmo", GROUPED),
    "OLMo 2": ("Olmo2", GROUPED),
    "OLMoE": ("Olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "Phi": ("Phi", GROUPED),
    "Phi-3": ("Phi3", GROUPED),
    "GPT-2": ("GPT2", {
        "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}),
    "GPT-NeoX": ("GPTNeoX", SMALL),
    "GPT-J": ("GPTJ", {
        "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "vocab_size": VOCABULARY,
        "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}),
    "OPT": ("OPT", {
        "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 128}),
    "BLOOM": ("Bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "StarCoder2": ("Starcoder2", GROUPED),
    "StableLM": ("StableLm", GROUPED),
    "Cohere": ("Cohere", GROUPED),
    "Granite": ("Granite", GROUPED),
    "SmolLM3": ("SmolLM3", GROUPED),
    "DeepSeek-V3": ("DeepseekV3", {
        **GROUPED, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1}),
}  # fmt: skip


def _class(name: str, what: str) -> Any:
    head = "ForCausalLM" if name not in ("GPT2",) else "LMHeadModel"
    if name == "Gemma3Text":
        return transformers.Gemma3ForCausalLM if what == "model" else transformers.Gemma3TextConfig
    return getattr(transformers, f"{name}{'Config' if what == 'config' else head}")


def build(architecture: str) -> nn.Module:
    """The model with random weights, the same in every call."""
    name, settings = SETTINGS[architecture]
    torch.manual_seed(0)
    model: nn.Module = _class(name, "model")(_class(name, "config")(**settings))
    return model.eval().requires_grad_(False)


def ids(rows: int = 2, length: int = 24) -> Tensor:
    """Random tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    """What the model makes of them."""
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits.float()


@dataclass(frozen=True)
class Outcome:
    """What both routes made of one architecture."""

    architecture: str
    by_module: int
    by_file: int
    left_alone: dict[str, int]
    """By file."""
    sqnr: float
    """Of the loaded directory against the 16-bit model, in dB."""
    differs: str
    """What the routes do not have in common; empty where they agree in every bit."""
    generated: int
    """Tokens that `generate` made."""


def outcome_of(architecture: str, folder: Path) -> Outcome:
    """Quantizes one architecture by both routes, loads what was written, and generates."""
    source, output = folder / "source", folder / "output"
    build(architecture).save_pretrained(source)
    loader = transformers.AutoModelForCausalLM
    original = loader.from_pretrained(source)
    expected = logits(original)
    by_module = mixq.quantize(loader.from_pretrained(source))
    plan = plan_directory(source, MixqOptions.from_user(options={"force": True}), CPU)
    DirectoryQuantization(plan, output).run(device=CPU, progress=lambda *_: None)
    by_file = loader.from_pretrained(output)
    found = logits(by_file)
    generated = by_file.generate(ids(1, 4), max_new_tokens=5, do_sample=False, pad_token_id=0)
    by_file.save_pretrained(folder / "again", max_shard_size="200KB")
    again = logits(loader.from_pretrained(folder / "again"))
    linears = [
        {name: each for name, each in model.named_modules() if isinstance(each, MixqLinear)}
        for model in (by_module, by_file)
    ]
    return Outcome(
        architecture,
        len(linears[0]),
        len(linears[1]),
        dict(Counter(entry.skip for entry in plan.quantization.left_alone.values())),
        float(sqnr(expected, found)),
        _difference(*linears, torch.equal(logits(by_module), found))
        or ("" if torch.equal(again, logits(by_file)) else "what it saves again"),
        int(generated.shape[1]) - 4,
    )


def _difference(by_module: dict[str, MixqLinear], by_file: dict[str, MixqLinear], equal: bool) -> str:
    if only := sorted(set(by_module) ^ set(by_file)):
        return f"{len(only)} linears, such as {only[0]}"
    for name, module in by_module.items():
        if not torch.equal(module.weight_codes, by_file[name].weight_codes):
            return f"codes of {name}"
    return "" if equal else "logits"
