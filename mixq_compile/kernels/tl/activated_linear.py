# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""`activated_linear`: the function in the epilogue of the Hopper product, else in a launch of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl import hopper
from mixq_compile.kernels.tl.hopper_tiles import choose_tile
from mixq_compile.kernels.tl.mixed_linear import describable, mixed_linear
from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.toolkit import (
    PRIORITY,
    await_previous_launch,
    ceil_div,
    multiprocessors,
    on_device,
    overlap,
    row_matrix,
    supports,
    tl,
    triton,
)
from mixq_compile.kernels.tl.unpacking import eight_bit_codes
from mixq_compile.ops.providers import KernelQuery, provider

BLOCK = 1024
_RELU, _SILU, _GELU = (tl.constexpr(hopper.FUNCTIONS.index(name)) for name in ("relu", "silu", "gelu"))


@triton.jit
def _activated(x, FUNCTION: tl.constexpr):
    """As `hopper.activated`, which is Gluon's."""
    if FUNCTION == _RELU:
        return tl.where(x < 0.0, 0.0, x)
    if FUNCTION == _SILU:
        return x / (1.0 + tl.exp(-x))
    if FUNCTION == _GELU:
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit(do_not_specialize=["rows"])
def _activate(
    product,  # [M, N], where gated [M, 2 N]
    out,  # [M, N]
    rows,
    features,
    product_stride,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    feature = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = feature < features
    place = product + row * product_stride + feature
    result = _activated(tl.load(place, mask=inside, other=0.0).to(tl.float32), FUNCTION)
    if GATED:
        result *= tl.load(place + features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + feature, result.to(out.dtype.element_ty), mask=inside)


def launch_activation(product: Tensor, out: Tensor, function: str, gated: bool) -> None:
    """The function of a product `[M, N]`, or where gated `[M, 2 N]`, into out `[M, N]`."""
    rows, features = out.shape
    enqueue(
        _activate, (ceil_div(features, BLOCK), rows),
        product, out, rows, features, product.stride(0),
        FUNCTION=hopper.FUNCTIONS.index(function), GATED=gated, BLOCK=BLOCK, **overlap(product),
    )  # fmt: skip


def supports_epilogue(query: KernelQuery) -> bool | str:
    """True on Hopper GPUs for 16-bit activations, else the reason why not."""
    verdict = supports(query)
    if verdict is not True:
        return verdict
    if not hopper.available(query.device):
        return "only the kernel for Hopper GPUs has it in its epilogue"
    return True if query.dtype != torch.float32 else "the kernel for Hopper GPUs takes 16-bit activations"


@provider("activated_linear", name="tl", priority=PRIORITY, supports=supports_epilogue)
def activated_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outliers: Tensor,
    count: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    function: str,
    gated: bool,
    small_m: int,
) -> Tensor:
    """Few rows, and matrices that descriptors cannot address, take two launches."""
    (features, slots), halves = outlier_weight.shape, 2 if gated else 1
    out = torch.empty((*x.shape[:-1], features // halves), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    rows = out.numel() // out.shape[-1]
    matrix = out.view(rows, out.shape[-1])
    with on_device(x):
        if rows > small_m and hopper.available(x.device) and x.dtype != torch.float32:
            code_rows, outlier_rows = row_matrix(codes), outliers.reshape(rows, slots)
            weight = eight_bit_codes(row_matrix(weight_codes), code_rows.shape[1])
            if describable(code_rows, outlier_rows, weight, outlier_weight, matrix):
                hopper.launch(
                    code_rows, scale.reshape(rows), outlier_rows, count, weight, weight_scale, outlier_weight,
                    bias, matrix, choose_tile(rows, features, multiprocessors(x.device)), function, gated,
                )  # fmt: skip
                return out
        product = mixed_linear(
            x, codes, scale, outliers, count, weight_codes, weight_scale, outlier_weight, bias, small_m
        )
        launch_activation(row_matrix(product), matrix, function, gated)
    return out
