# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""4-bit codes made into int8 ones: in registers, or in memory for the kernels that want 8 bits.

Unpacking in the registers of the large matrix kernels was tried and was several times slower than
writing the int8 codes once, because their weight operand must lie in shared memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.toolkit import await_previous_launch, ceil_div, overlap, tl, triton
from mixq_compile.ops.weight_codes import aligned_empty, weight_bits

BYTES_PER_PROGRAM = 2048


def _assembly(base: int, one: int, minus_base: int) -> str:
    """PTX that makes four bytes into two pairs each of low and of high nibbles, as 16-bit numbers.

    A byte n + 8 under the byte `base` is the number base + n + 8, from which `minus_base` leaves n.
    """
    lines = [
        ".reg .b32 low, high, base, one, minus;",
        f"mov.b32 base, {base:#x}; mov.b32 one, {one:#x}; mov.b32 minus, {minus_base:#x};",
        "lop3.b32 low, $4, 0x0F0F0F0F, 0x08080808, 0x6A; shr.u32 high, $4, 4;",
        "lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6A;",
    ]
    kind = "bf16x2" if base == 0x43434343 else "f16x2"
    for place, (source, selector) in enumerate(
        (("low", 0x4140), ("low", 0x4342), ("high", 0x4140), ("high", 0x4342))
    ):
        lines.append(f"prmt.b32 ${place}, {source}, base, {selector:#x};")
        lines.append(f"fma.rn.{kind} ${place}, ${place}, one, minus;")
    return "{" + " ".join(lines) + "}"


_TO_BF16 = tl.constexpr(_assembly(0x43434343, 0x3F803F80, 0xC308C308))
_TO_FP16 = tl.constexpr(_assembly(0x64646464, 0x3C003C00, 0xE408E408))


@triton.jit
def nibbles(packed):
    """int8 codes of the even and of the odd columns that uint8 bytes hold."""
    both = packed.to(tl.int8, bitcast=True)
    return (both << 4) >> 4, both >> 4


@triton.jit
def nibble_values(packed, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The same codes as numbers of a floating-point dtype, which holds them exactly."""
    if (dtype == tl.float32) | (not ASSEMBLY):
        low_codes, high_codes = nibbles(packed)
        low, high = low_codes.to(dtype), high_codes.to(dtype)
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _TO_BF16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _TO_FP16, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _unpack(
    packed,  # [N, ceil(K/2)] uint8
    codes,  # [N, K] int8
    columns,
    packed_stride,
    codes_stride,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        await_previous_launch()
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(packed + row * packed_stride + byte, mask=2 * byte < columns, other=0)
    low, high = nibbles(held)
    column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    both = tl.reshape(tl.join(low, high), (2 * BLOCK,))
    tl.store(codes + row * codes_stride + column, both, mask=column < columns)


def eight_bit_codes(weight_codes: Tensor, in_features: int) -> Tensor:
    """int8 codes `[N, K]` of a weight of either width; written anew by one launch for a packed one."""
    if weight_bits(weight_codes) == 8:
        return weight_codes
    rows, length = weight_codes.shape
    codes = aligned_empty((rows,), in_features, torch.int8, weight_codes.device)
    enqueue(
        _unpack, (rows, ceil_div(length, BYTES_PER_PROGRAM)),
        weight_codes, codes, in_features, weight_codes.stride(0), codes.stride(0),
        BLOCK=BYTES_PER_PROGRAM, **overlap(weight_codes),
    )  # fmt: skip
    return codes
