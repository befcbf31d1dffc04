"""`mixq bench generate`: `generate()` as a user calls it, quantized and not, under the same preparation."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixq_compile as mixq
from mixq_compile.benchmarking.baselines import float_name
from mixq_compile.benchmarking.choices import Announce
from mixq_compile.benchmarking.environment import Environment, examine
from mixq_compile.benchmarking.generating_results import NAME, GenerateCase, GenerateOptions, document
from mixq_compile.benchmarking.planted import generator
from mixq_compile.benchmarking.results import Document
from mixq_compile.benchmarking.timing import measure_floor
from mixq_compile.benchmarking.variants import calibrated_options
from mixq_compile.errors import MixqError, OptionError
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.generation import prepared_generation

UNPREPARED = ", unprepared"
CALIBRATION = (2, 4, 64)
"""Batches, sequences and tokens on which 4-bit schemes are calibrated."""


Load = Callable[[], Any]
"""Makes the unquantized model, on its device."""


@torch.no_grad()
def run(
    options: GenerateOptions,
    device: torch.device,
    announce: Announce,
    commit: str = "",
    *,
    load: Load,
    folder: Path | None = None,
    resume: bool = False,
) -> Document:
    """Measures every variant at every batch; into `folder` after each, where one is given.

    `resume` keeps the cases that the folder has of the same options, device and versions.
    """
    environment = examine(device, measure_floor(device, options.replays), commit)
    known = _known_cases(folder, options, environment) if resume else {}
    cases: list[GenerateCase] = []
    names = [None, *options.schemes]
    ways = (False, True) if options.unprepared else (True,)
    total, done = len(names) * len(ways) * len(options.batches), 0
    for scheme in names:
        model: Any = None
        for prepared in ways:
            for batch in sorted(options.batches, reverse=True):
                name = _variant(scheme, getattr(torch, options.dtype), prepared)
                announce(done, total, f"{name}, batch {batch}")
                done += 1
                if (name, batch) in known:
                    cases.append(known[name, batch])
                    continue
                if model is None:
                    model = _load(load, scheme, options)
                cases.append(_measure(model, name, batch, prepared, options, device))
                if folder is not None:
                    document(options, environment, cases).write(folder)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return document(options, environment, cases)


def _variant(scheme: str | None, dtype: torch.dtype, prepared: bool) -> str:
    return (scheme or float_name(dtype)) + ("" if prepared else UNPREPARED)


def _load(load: Load, scheme: str | None, options: GenerateOptions) -> Any:
    model = load().eval().requires_grad_(False)
    # Every sequence gets all its tokens, whatever they are.
    model.generation_config.eos_token_id = None
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    if scheme is not None:
        batches, rows, tokens = CALIBRATION
        given = [
            {"input_ids": random_prompt(model, rows, min(tokens, options.positions), seed)}
            for seed in range(batches)
        ]
        mixq.quantize(model, scheme, **calibrated_options(model, scheme, given))
    return model


def random_prompt(model: Any, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Tokens `[B, T]` int64 of a model's vocabulary."""
    device = model.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(
        1, vocabulary, (batch, tokens), dtype=torch.int64, device=device, generator=generator(device, seed)
    )


def _measure(
    model: Any, name: str, batch: int, prepared: bool, options: GenerateOptions, device: torch.device
) -> GenerateCase:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    mixq.restore_generation(model)
    if prepared:
        backend = _backend(model, options)
        mixq.prepare_for_generation(
            model, max_length=options.positions, batch_sizes=batch, cache_lengths=options.positions, **backend
        )
    prompt = random_prompt(model, batch, options.prompt)
    before = torch_compat.compiled_graphs()
    first_call = _seconds(model, prompt, options.new, device)
    compiled = torch_compat.compiled_graphs() - before
    _seconds(model, prompt, options.new, device)
    before = torch_compat.compiled_graphs()
    other = random_prompt(model, batch, max(1, options.prompt - options.prompt // 3 - 1), seed=1)
    for _ in range(2):
        _seconds(model, other, options.new, device)
    another = torch_compat.compiled_graphs() - before
    rounds = [
        (_seconds(model, prompt, options.new, device), _seconds(model, prompt, 1, device))
        for _ in range(options.replays)
    ]
    whole, first = (statistics.median(times) for times in zip(*rounds, strict=True))
    step = (whole - first) / (options.new - 1)
    share = _host_share(model, prompt, options, device) if prepared else None
    inside = prepared_generation(model)
    caches = None if inside is None else inside.caches
    case = GenerateCase(
        variant=name,
        batch=batch,
        decode_tokens_per_second=batch / step,
        whole_tokens_per_second=batch * options.new / whole,
        first_token_ms=first * 1e3,
        step_ms=step * 1e3,
        host_share_ms=None if share is None else share * 1e3,
        step_without_host_share_ms=None if share is None else (step - share) * 1e3,
        memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        weight_bytes=_weight_bytes(model),
        cache_bytes=None if caches is None else caches.nbytes,
        first_call_seconds=first_call,
        compiled_graphs=compiled,
        graphs_of_another_length=another,
    )
    mixq.restore_generation(model)
    return case


def _backend(model: Any, options: GenerateOptions) -> dict[str, Any]:
    if options.lowering == "inductor":
        return {}
    quantized = any(isinstance(module, mixq.MixqLinear) for module in model.modules())
    if quantized:
        return {"backend": "mixq", "options": {"lowering": options.lowering}}
    return {"backend": options.lowering}


def _seconds(model: Any, prompt: Tensor, new: int, device: torch.device) -> float:
    """Wall time of one call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    if found.shape[1] != prompt.shape[1] + new:
        raise MixqError(f"generate() stopped after {found.shape[1] - prompt.shape[1]} of {new} tokens.")
    return seconds


def _host_share(model: Any, prompt: Tensor, options: GenerateOptions, device: torch.device) -> float:
    """Seconds of a step of `generate()` whose forward is empty: transformers' own, and of the preparation."""
    with empty_forward(model):
        rounds = [
            (_seconds(model, prompt, options.new, device), _seconds(model, prompt, 1, device))
            for _ in range(options.replays)
        ]
    whole, first = (statistics.median(times) for times in zip(*rounds, strict=True))
    return float((whole - first) / (options.new - 1))


@contextmanager
def empty_forward(model: Any) -> Iterator[None]:
    """A time in which a prepared model's steps compute nothing, and return logits that were made before."""
    inside = prepared_generation(model)
    assert inside is not None
    compiled, inside.compiled = inside.compiled, _EmptySteps(model.get_output_embeddings())
    try:
        yield
    finally:
        inside.compiled = compiled


class _EmptySteps(dict[Any, Any]):
    """Stands for all compiled steps of a model."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self._width, self._like = head.weight.shape[0], head.weight
        self._logits: dict[int, Tensor] = {}

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: Any) -> Callable[[dict[str, Any]], Any]:
        return self._step

    def _step(self, inputs: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        rows = inputs["input_ids"].shape[0]
        if rows not in self._logits:
            self._logits[rows] = self._like.new_zeros(rows, 1, self._width)
        return CausalLMOutputWithPast(
            logits=self._logits[rows],  # type: ignore[arg-type]
            past_key_values=inputs["past_key_values"],
        )


def _weight_bytes(model: Any) -> int:
    tensors = {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.nbytes for each in tensors.values())


def _known_cases(
    folder: Path | None, options: GenerateOptions, environment: Environment
) -> dict[tuple[str, int], GenerateCase]:
    """The cases of an earlier run, by variant and batch. Raises OptionError where it measured otherwise."""
    if folder is None:
        raise OptionError("--resume goes on with the results in a folder: give --output, too.")
    path = folder / f"{NAME}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    may_differ = ("batches", "schemes", "unprepared")
    mine = json.loads(json.dumps(dataclasses.asdict(options)))
    place = dataclasses.asdict(environment)
    for what, wanted, got, names in (
        ("options", mine, found["options"], [name for name in mine if name not in may_differ]),
        ("environment", place, found["environment"], ["device", "mixq_compile", "torch", "commit"]),
    ):
        for name in names:
            if wanted[name] != got.get(name):
                raise OptionError(
                    f"{path} has {what} {name}={got.get(name)!r}, and this run {wanted[name]!r}: results of "
                    "the two do not belong together. Give another --output, or leave --resume away."
                )
    cases = [GenerateCase(**case) for case in found["cases"]]
    return {(case.variant, case.batch): case for case in cases}
