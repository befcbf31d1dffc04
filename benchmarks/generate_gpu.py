"""Checks `prepare_for_generation` on a GPU, then measures it: `generate_gpu.py OUT [seconds]`.

First what a CPU cannot show, on a small Llama: text equal to the unprepared model's, CUDA graphs without a
skip, nothing compiled for other prompts, no growth of memory, a larger cache after a smaller one. Each check
prints a line. Then `mixq bench generate` on Llama-2-7B, from few layers to all, until the time is used up;
its cases are written as they are measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import mixq_compile as mixq
from mixq_compile.benchmarking.decoders import plant_outliers
from mixq_compile.runtime.generation import prepared_generation

SIZES: dict[str, Any] = {"max_length": 512, "batch_sizes": (1, 4), "cache_lengths": (256, 512)}
LENGTHS = ((7,), (16,), (100,), (9, 3), (30, 30, 4, 17), (200,), (1,), (300,))
STEPS = (
    ("--layers", "8", "--batches", "1,32", "--schemes", "w8a8o16"),
    ("--batches", "1,8,32", "--schemes", "w8a8o16,w4a8o16"),
)
CALLS = 50


def model(dtype: torch.dtype) -> Any:
    """A Llama of four layers, the same in every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=4000, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval().requires_grad_(False)
    plant_outliers(made)
    return made.to("cuda", dtype)


def prompts(lengths: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Left-padded tokens and their mask."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 4000, (len(lengths), max(lengths)), generator=random)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": (tokens * mask).cuda(), "attention_mask": mask.cuda()}


def text(of: Any, lengths: tuple[int, ...], new: int = 24, seed: int = 0) -> torch.Tensor:
    """Greedy tokens."""
    return of.generate(**prompts(lengths, seed), max_new_tokens=new, do_sample=False)


def say(check: str, right: bool, **facts: Any) -> bool:
    """One line for one check."""
    print(json.dumps({"check": check, "right": right, **facts}), flush=True)
    return right


def agreement(found: torch.Tensor, wanted: torch.Tensor, prompt: int) -> float:
    """Part of the new tokens that are equal until the first that is not."""
    equal = (found == wanted)[:, prompt:].long().cumprod(dim=1)
    return float(equal.float().mean())


def check(kind: str) -> bool:
    """Everything about one kind of model."""
    # In fp32 greedy texts do not depend on the last bit, except for quantized ones at a rounding's edge.
    wanted_of, prepared = model(torch.float32), model(torch.float32)
    if kind == "quantized":
        mixq.quantize(wanted_of)
        mixq.quantize(prepared)
    begin = time.perf_counter()
    mixq.prepare_for_generation(prepared, **SIZES)
    right = True
    least = 1.0 if kind == "plain" else 0.5
    for number, lengths in enumerate(LENGTHS):
        mixq.reset(wanted_of)
        mixq.reset(prepared)
        for _ in range(3):  # warm-up, recording, replay
            mixq.reset(prepared)
            found = text(prepared, lengths, seed=number)
        part = agreement(found, text(wanted_of, lengths, seed=number), max(lengths))
        right &= say(f"{kind}: text of prompts {lengths}", part >= least, agreement=part)
    seconds = time.perf_counter() - begin
    inside = prepared_generation(prepared)
    skips = counters["inductor"]["cudagraph_skips"]
    right &= say(
        f"{kind}: CUDA graphs", inside.in_graphs and not skips, skips=skips, seconds=round(seconds, 1)
    )
    graphs = counters["stats"]["unique_graphs"]
    torch.cuda.synchronize()
    text(prepared, (50,))
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(CALLS):
        text(prepared, LENGTHS[number % len(LENGTHS)], 8, seed=number)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    new = counters["stats"]["unique_graphs"] - graphs
    right &= say(f"{kind}: {CALLS} further calls compile nothing", new == 0, compiled=new)
    grown = after[0] - before[0], after[1] - before[1]
    right &= say(f"{kind}: memory", grown[0] <= 1 << 20 and grown[1] <= 64 << 20, grown_bytes=grown)
    mixq.restore_generation(prepared)
    return right


def main() -> int:
    """Checks, then measures as long as the time allows."""
    out, limit = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 570.0
    begin = time.perf_counter()
    right = all([check("plain"), check("quantized")])
    torch.cuda.empty_cache()
    for number, step in enumerate(STEPS):
        left = limit - (time.perf_counter() - begin)
        if left < 60:
            break
        command = [
            sys.executable, "-c", "from mixq_compile.cli import main; main()", "bench", "generate",
            "llama-2-7b", *step, "--unprepared", "--output", str(out / f"step{number + 1}"),
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, timeout=left)
        except subprocess.TimeoutExpired:
            print("the time is used up; measured cases are in", out, flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
