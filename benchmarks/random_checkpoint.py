"""Writes a checkpoint of random weights in the shape of a Llama, a block at a time, as large as asked for.

python -m benchmarks.random_checkpoint DIR               # Llama-2-7B: 13.48 GB of bfloat16, two shards
python -m benchmarks.random_checkpoint DIR --layers 2 --shard 0.2
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from mixq_compile.checkpoints.safetensors_files import PlannedTensor, header_bytes

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
BLOCK = 8 << 20


def tensors(layers: int, hidden: int, intermediate: int, vocabulary: int) -> list[PlannedTensor]:
    """The tensors of a Llama, in the order of its layers."""
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return [PlannedTensor(name, "BF16", shape) for name, shape in shapes.items()]


def write_shard(path: Path, planned: list[PlannedTensor], seed: int) -> None:
    """Writes one file: norms of ones, everything else normal with a deviation of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(BLOCK, generator=generator) * 0.02).to(torch.bfloat16)
    with open(path, "wb") as file:
        file.write(header_bytes(planned))
        for number, tensor in enumerate(planned):
            left = tensor.nbytes // 2
            if len(tensor.shape) == 1:
                file.write(torch.ones(left, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
                continue
            shift = (seed * 7919 + number * 104729) % BLOCK
            block = noise.roll(shift)  # As many different weights as there are tensors, without their time.
            while left:
                part = block[: min(left, BLOCK)]
                file.write(memoryview(part.view(torch.uint8).numpy().data))
                left -= part.numel()
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Writes the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--shard", type=float, default=9.95, help="most GB of one file")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    groups: list[list[PlannedTensor]] = [[]]
    for tensor in tensors(options.layers, options.hidden, options.intermediate, options.vocabulary):
        if groups[-1] and sum(each.nbytes for each in groups[-1]) + tensor.nbytes > options.shard * 1e9:
            groups.append([])
        groups[-1].append(tensor)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(options.directory / name, group, number)
        weight_map |= {tensor.name: name for tensor in group}
    index = {
        "metadata": {"total_size": sum(t.nbytes for group in groups for t in group)},
        "weight_map": weight_map,
    }
    (options.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": options.hidden, "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "vocab_size": options.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (options.directory / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
