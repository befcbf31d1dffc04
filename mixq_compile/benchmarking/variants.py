"""The ways to run one module: 16 bit under Inductor, quantized by mixq, and by peers."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mixq_compile as mixq
from mixq_compile.benchmarking.baselines import float_name, llm_int8_linear, quantized_by_torchao
from mixq_compile.benchmarking.choices import LLM_INT8, TORCHAO_FP8, TORCHAO_INT8
from mixq_compile.benchmarking.timing import Call, first_line
from mixq_compile.runtime.backend import mixq_backend
from mixq_compile.schemes.registry import get_scheme

EAGER_SUFFIX = ", eager"
AUTOTUNED = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Variant:
    """One way to run a module."""

    name: str
    module: nn.Module
    compiled: Callable[..., Any] | None
    """None for a peer that runs eagerly only."""
    optional: bool
    """True for a peer, whose failure is a reason and no error."""
    half: bool = False
    """Takes fp16."""

    @property
    def nbytes(self) -> int:
        """Bytes of parameters and buffers, shared ones once."""
        tensors = {
            tensor.data_ptr(): tensor for tensor in (*self.module.parameters(), *self.module.buffers())
        }
        return sum(tensor.nbytes for tensor in tensors.values())


@dataclass(frozen=True)
class LinearBytes:
    """Memory of the linears that a scheme quantizes."""

    scheme: str
    linears: int
    bytes_before: int
    bytes_after: int
    """Codes, scales, outlier weights and states."""
    ratio: float


@dataclass(frozen=True)
class VariantOptions:
    """Which variants, and how they are compiled."""

    schemes: tuple[str, ...] = ("w8a8o16",)
    peers: tuple[str, ...] = ()
    autotune: bool = False
    """Inductor's max-autotune for 16 bit, mixq and torchao."""
    lowering: str = "inductor"


def build_variants(
    module: nn.Module, options: VariantOptions, batches: Sequence[Any]
) -> tuple[list[Variant], list[LinearBytes], dict[str, str]]:
    """16 bit first, then schemes, then peers; memory of each scheme; peers that cannot be built.

    `batches` are what 4-bit schemes are calibrated on: they keep no 16-bit weights.
    """
    dtype = next(module.parameters()).dtype
    variants = [Variant(float_name(dtype), module, _by_inductor(module, options), optional=False)]
    memory, missing = [], {}
    for scheme in options.schemes:
        swapped = copy.deepcopy(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mixq.quantize(swapped, scheme, **calibrated_options(module, scheme, batches))
        variants.append(Variant(scheme, swapped, _by_mixq(swapped, options), optional=False))
        memory.append(_linear_bytes(swapped, scheme))
    for name in options.peers:
        try:
            variants.append(_peer(name, copy.deepcopy(module), options))
        except Exception as error:
            missing[name] = first_line(error)
    return variants, memory, missing


def _by_inductor(module: nn.Module, options: VariantOptions) -> Callable[..., Any]:
    mode = AUTOTUNED if options.autotune and options.lowering == "inductor" else None
    return torch.compile(module, backend=options.lowering, dynamic=False, mode=mode)


def _by_mixq(module: nn.Module, options: VariantOptions) -> Callable[..., Any]:
    chosen: dict[str, Any] = {"lowering": options.lowering}
    if options.autotune:
        chosen["mode"] = AUTOTUNED
    # The function itself: a source tree that is not installed has no entry point.
    return torch.compile(module, backend=mixq_backend, dynamic=False, options=chosen)


def calibrated_options(module: nn.Module, scheme: str, batches: Sequence[Any]) -> dict[str, Any]:
    """Options of `mixq.quantize`: columns fixed by calibration where codes are too coarse to find them."""
    if get_scheme(scheme).weight.bits == 8:
        return {}
    return {"stats": mixq.calibrate(module, batches, progress=False), "miss": "static"}


def _linear_bytes(module: nn.Module, scheme: str) -> LinearBytes:
    quantized = mixq.report(module).quantized
    before = sum(linear.bytes_before for linear in quantized)
    after = sum(linear.bytes_after for linear in quantized)
    return LinearBytes(scheme, len(quantized), before, after, after / before)


def _peer(name: str, module: nn.Module, options: VariantOptions) -> Variant:
    if name in (TORCHAO_INT8, TORCHAO_FP8):
        made = quantized_by_torchao(module, name)
        return Variant(name, made, _by_inductor(made, options), optional=True)
    assert name == LLM_INT8
    for parent in list(module.modules()):
        for child, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and child != "lm_head":
                setattr(parent, child, llm_int8_linear(linear.weight, linear.bias))
    # Norms, embeddings and head; quantized weights are int8 and stay.
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.half()
    return Variant(name, module, None, optional=True, half=True)


@dataclass(frozen=True)
class Prepared:
    """Variants on one input, compiled and ready to be timed."""

    calls: dict[str, Call]
    first_call_seconds: dict[str, float]
    """Seconds of the first compiled call, compilation included, without Inductor's caches."""
    peak_bytes: dict[str, int]
    """The variant's own bytes, the input's, and the most that a compiled call takes beside them; GPU only."""
    missing: dict[str, str]


def prepare(
    variants: Sequence[Variant],
    inputs: Callable[[bool], Mapping[str, Any]],
    device: torch.device,
    *,
    reset: Callable[[], object],
    held_bytes: int = 0,
) -> Prepared:
    """Compiles each variant for one input.

    `inputs(half)` gives the keyword arguments, `reset` is called before each run, and `held_bytes` are
    those of caches among the inputs.
    """
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    missing: dict[str, str] = {}
    for variant in variants:
        given = inputs(variant.half)
        calls[variant.name + EAGER_SUFFIX] = Call(
            lambda module=variant.module, given=given: module(**given),  # type: ignore[misc]
            prepare=reset, graphed=False, optional=variant.optional,
        )  # fmt: skip
        if variant.compiled is None:
            continue
        try:
            seconds[variant.name] = _first_call(variant.compiled, given, reset, device)
            if device.type == "cuda":
                extra = _extra_bytes(variant.compiled, given, reset, device)
                peaks[variant.name] = variant.nbytes + held_bytes + extra
        except Exception as error:
            if not variant.optional:
                raise
            missing[variant.name] = first_line(error)
            continue
        calls[variant.name] = Call(
            lambda compiled=variant.compiled, given=given: compiled(**given),  # type: ignore[misc]
            prepare=reset, optional=variant.optional,
        )  # fmt: skip
    return Prepared(calls, seconds, peaks, missing)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_call(
    compiled: Callable[..., Any], given: Mapping[str, Any], reset: Callable[[], object], device: torch.device
) -> float:
    reset()
    _synchronize(device)
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")
        begin = time.perf_counter()
        compiled(**given)
        _synchronize(device)
        return time.perf_counter() - begin


def _extra_bytes(
    compiled: Callable[..., Any], given: Mapping[str, Any], reset: Callable[[], object], device: torch.device
) -> int:
    """The most that a warm call takes beside what is allocated before it."""
    reset()
    compiled(**given)
    reset()
    _synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compiled(**given)
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def warm_compiler(device: torch.device, lowering: str) -> None:
    """Compiles something small, so that no variant's first call pays for starting the compiler."""
    x = torch.ones(32, 32, dtype=torch.float32, device=device)
    torch.compile(lambda values: (values + 1).sum(dim=1), backend=lowering)(x)
    torch.compiler.reset()
