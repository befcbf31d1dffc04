"""The names that options of benchmarks take, and how to read them; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.schemes.registry import accepted_names, get_scheme

Announce = Callable[[int, int, str], None]
"""Told how many cases are done, of how many, and which one begins."""

GEMM, WHOLE, QUANTIZE, ERRORS = "gemm", "whole", "quantize", "errors"
PARTS = (GEMM, WHOLE, QUANTIZE, ERRORS)
"""Parts of `mixq bench kernels`."""
PREFILL, DECODE, SINGLE = "prefill", "decode", "single"
KINDS = (PREFILL, DECODE, SINGLE)
"""Workloads of `mixq bench model`."""
HOST_WAYS = ("compiled", "graphs", "eager")
"""Ways in which `mixq bench host` runs layers."""

INT_MM, FP8, FP8_DYNAMIC = "int_mm", "fp8", "fp8-dynamic"
INDUCTOR, TORCHAO_INT8, TORCHAO_FP8, LLM_INT8 = "inductor", "torchao-int8", "torchao-fp8", "llm-int8"
PRODUCT_PEERS = (INT_MM, FP8)
"""Peers of the product alone: their operands are quantized before."""
WHOLE_PEERS = (FP8_DYNAMIC, INDUCTOR, TORCHAO_INT8, TORCHAO_FP8, LLM_INT8)
"""Peers of the whole linear, quantization included."""
MODEL_PEERS = (TORCHAO_INT8, TORCHAO_FP8, LLM_INT8)
"""Peers of layers and models."""
PEERS = (*PRODUCT_PEERS, *WHOLE_PEERS)
ON_REQUEST = (INDUCTOR, TORCHAO_INT8, TORCHAO_FP8, LLM_INT8)
DEFAULT_PEERS = tuple(name for name in PEERS if name not in ON_REQUEST)
LABELS = {
    INT_MM: "torch._int_mm",
    FP8: "fp8 row-wise",
    FP8_DYNAMIC: "fp8 row-wise, dynamic",
    INDUCTOR: "Inductor, max-autotune",
    TORCHAO_INT8: "torchao int8",
    TORCHAO_FP8: "torchao fp8",
    LLM_INT8: "LLM.int8()",
}


def label(name: str) -> str:
    """A peer's name for reading."""
    return LABELS.get(name, name)


def not_asked_for(names: Sequence[str], possible: Sequence[str]) -> dict[str, str]:
    """The possible peers that are not among `names`, with how to ask for them."""
    return {name: f"not asked for (--peers {name})" for name in possible if name not in names}


def parse_numbers(text: str) -> tuple[int, ...]:
    """The positive whole numbers of a text such as `1,16,1024`. Raises OptionError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"positive whole numbers with commas between, for example 1,16,1024, not {text!r}.")
    return tuple(int(part) for part in parts)


def parse_batch(text: str) -> tuple[int, int]:
    """Sequences and tokens of each of a text such as `8x2048`. Raises OptionError for anything else."""
    parts = text.replace("×", "x").split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"sequences x tokens, for example 8x2048, not {text!r}.")
    return int(parts[0]), int(parts[1])


def parse_batches(text: str) -> tuple[tuple[int, int], ...]:
    """Several of what `parse_batch` reads, with commas between."""
    return tuple(parse_batch(part) for part in text.split(","))


def parse_names(text: str, kind: str, valid: Sequence[str]) -> tuple[str, ...]:
    """The names of a text such as `a,b`; `all` and `none` are understood.

    Raises OptionError that lists the valid names.
    """
    if text in ("all", "none"):
        return tuple(valid) if text == "all" else ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in valid:
            raise unknown_name(kind, name, (*valid, "all", "none"))
    return names


def parse_schemes(text: str) -> tuple[str, ...]:
    """The schemes of a text such as `w8a8o16,w4a8o16`. Raises OptionError that lists the valid names."""
    chosen = parse_names(text, "scheme", accepted_names())
    return tuple(dict.fromkeys(get_scheme(name).name for name in chosen))


def check_replays(replays: int) -> None:
    """Raises OptionError for fewer timed runs than percentiles need."""
    if replays < 2:
        raise OptionError(f"replays must be at least 2, for percentiles, not {replays}.")
