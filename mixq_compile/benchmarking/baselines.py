"""The peers that a quantized linear is measured beside, each built from the same weight and activation.

A peer that cannot run here raises, and the reason stands in the result: none is dropped in silence.
Those of `choices.ON_REQUEST` compile or tune for each shape and take seconds to minutes of it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.benchmarking.choices import (
    FP8,
    FP8_DYNAMIC,
    INDUCTOR,
    INT_MM,
    LLM_INT8,
    ON_REQUEST,
    TORCHAO_FP8,
    TORCHAO_INT8,
)
from mixq_compile.benchmarking.timing import Call, PeerMissing, first_line
from mixq_compile.runtime import torch_compat

_SMALLEST_SCALE = 1e-12


def float_name(dtype: torch.dtype) -> str:
    """What the unquantized baseline of a dtype is called."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _int_mm(weight: Tensor, x: Tensor) -> Callable[[Tensor], object]:
    """Integer codes in, int32 out: nothing scaled, nothing kept in 16 bit."""
    if x.is_cuda and x.shape[0] <= 16:
        raise PeerMissing("takes more than 16 rows")
    weight_codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=x.device)
    codes = torch.randint(-127, 128, x.shape, dtype=torch.int8, device=x.device)
    return lambda _: torch._int_mm(codes, weight_codes.t())


def fp8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise fp8 codes and fp32 scales `[M, 1]`."""
    largest = x.abs().amax(dim=1, keepdim=True).float().clamp_min(_SMALLEST_SCALE)
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


@functools.cache
def _compiled_fp8_codes() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(fp8_codes, dynamic=False)


def _fp8_product(codes: Tensor, scale: Tensor, weight_codes: Tensor, weight_scale: Tensor) -> Tensor:
    return torch._scaled_mm(
        codes, weight_codes.t(), scale_a=scale, scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16, use_fast_accum=codes.is_cuda,
    )  # fmt: skip


def _fp8(weight: Tensor, x: Tensor) -> Callable[[Tensor], object]:
    weight_codes, weight_scale = fp8_codes(weight)
    codes, scale = fp8_codes(x)
    return lambda _: _fp8_product(codes, scale, weight_codes, weight_scale)


def _fp8_dynamic(weight: Tensor, x: Tensor) -> Callable[[Tensor], object]:
    """Inductor writes the quantization, the library multiplies: what a compiled fp8 linear becomes."""
    weight_codes, weight_scale = fp8_codes(weight)
    _fp8_product(*fp8_codes(x), weight_codes, weight_scale)

    def run(values: Tensor) -> Tensor:
        if values.shape[0] > 1:
            # One compilation for every M; a fresh one for each K.
            torch_compat.mark_dynamic(values, 0)
        return _fp8_product(*_compiled_fp8_codes()(values), weight_codes, weight_scale)

    return run


def _inductor(weight: Tensor, x: Tensor) -> Callable[[Tensor], object]:
    compiled = torch.compile(_linear(weight), dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda values: compiled(values)


def _linear(weight: Tensor) -> nn.Sequential:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Sequential(linear)


def require(package: str) -> Any:
    """The package. Raises PeerMissing where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except Exception as error:  # built for another torch or GPU, a package raises what it likes
        raise PeerMissing(f"{package.split('.')[0]} cannot be imported ({first_line(error)})") from error


def quantized_by_torchao(model: nn.Module, name: str) -> nn.Module:
    """The model with torchao's dynamic int8 or fp8 row-wise linears, in place. Raises PeerMissing."""
    quantization = require("torchao.quantization")
    if name == TORCHAO_INT8:
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantization.quantize_(model, config)
    return model


def _torchao(name: str) -> Callable[[Tensor, Tensor], Callable[[Tensor], object]]:
    def build(weight: Tensor, x: Tensor) -> Callable[[Tensor], object]:
        compiled = torch.compile(quantized_by_torchao(_linear(weight), name), dynamic=False)
        return lambda values: compiled(values)

    return build


def llm_int8_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A bitsandbytes linear with outlier columns at 6, for fp16 inputs. Raises PeerMissing."""
    modules = require("bitsandbytes.nn")
    if not weight.is_cuda:
        raise PeerMissing("measured on GPUs only")
    made = modules.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False, threshold=6.0
    )
    made.weight = modules.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.half(), requires_grad=False)
    return made.to(weight.device).eval()  # type: ignore[no-any-return]


def _llm_int8(weight: Tensor, x: Tensor) -> Callable[[Tensor], object]:
    linear = llm_int8_linear(weight)
    return lambda values: linear(values.half())


_BUILDERS: dict[str, Callable[[Tensor, Tensor], Callable[[Tensor], object]]] = {
    INT_MM: _int_mm,
    FP8: _fp8,
    FP8_DYNAMIC: _fp8_dynamic,
    INDUCTOR: _inductor,
    TORCHAO_INT8: _torchao(TORCHAO_INT8),
    TORCHAO_FP8: _torchao(TORCHAO_FP8),
    LLM_INT8: _llm_int8,
}
UNGRAPHED = (LLM_INT8,)
"""Peers that ask the device which columns are outliers, so that no CUDA graph can hold them."""


def build_peers(
    names: Sequence[str], weight: Tensor, x: Tensor
) -> tuple[dict[str, Callable[[Tensor], object]], dict[str, str]]:
    """The peers of these names for a weight `[N, K]` and activations like x `[M, K]`, by name.

    A function takes the activation (the products ignore it: theirs is quantized before). Returns also
    the reason for each peer that cannot be built.
    """
    built: dict[str, Callable[[Tensor], object]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            built[name] = _BUILDERS[name](weight, x)
        except Exception as error:  # whatever keeps a peer from running is recorded as its reason
            missing[name] = first_line(error)
    return built, missing


def peer_calls(peers: Mapping[str, Callable[[Tensor], object]], x: Tensor) -> dict[str, Call]:
    """The peers as calls to time."""
    return {
        name: Call(lambda run=run: run(x), graphed=name not in UNGRAPHED, optional=True)  # type: ignore[misc]
        for name, run in peers.items()
    }


def start_over(names: Sequence[str], new_shape: bool) -> None:
    """Forgets what Dynamo compiled, before it meets so many shapes that it would compile no more.

    Called for every number of rows; only peers compiled for a single one need it each time.
    """
    if new_shape or any(name in ON_REQUEST for name in names):
        torch.compiler.reset()
