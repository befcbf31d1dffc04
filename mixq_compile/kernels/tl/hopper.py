# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""`mixed_linear` for Hopper GPUs (sm_90), in Gluon: a warp that loads and warps that multiply.

The loading warp streams the int8 tiles and then the outlier tiles through one ring of buffers (64
16-bit columns have the bytes of 128 codes), so that nothing drains between the two products, and runs
ahead into the next output tile while this one is stored. `hopper_schedule` deals out the tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mixq_compile.kernels.tl.hopper_schedule import (
    count_pieces,
    handover_flags,
    piece,
    shared_steps,
    tile_place,
)
from mixq_compile.kernels.tl.hopper_sums import add_left_sums, leave_sums
from mixq_compile.kernels.tl.hopper_tiles import (
    DEPTH,
    LARGEST_TILE,
    SHARED_MEMORY,
    Tile,
    parts_stored,
    shared_memory,
)
from mixq_compile.kernels.tl.plan_recording import enqueue
from mixq_compile.kernels.tl.tiles import TILES_PER_GROUP
from mixq_compile.kernels.tl.toolkit import (
    TRITON_PROBLEM,
    capability,
    ceil_div,
    interpreting,
    multiprocessors,
)
from mixq_compile.ops.outlier_state import COUNT

try:
    if TRITON_PROBLEM is not None:
        raise ImportError(TRITON_PROBLEM)
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_wait
except ImportError:
    from mixq_compile.kernels.tl import toolkit

    gluon, gl = toolkit.triton, toolkit.tl
    HAS_GLUON = False
else:
    HAS_GLUON = True

LOADING_WARP_REGISTERS = 24
REGISTERS_FOR_TWO = 128
"""Registers of a thread on entry that leave room for two programs of 8 warps on a multiprocessor."""
LARGEST_INTEGER_INSTRUCTION = 128
FUNCTIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
"""Activation functions of the epilogue; a kernel knows them by their place."""
_COUNT = gl.constexpr(COUNT)
_RELU, _SILU, _GELU, _GELU_TANH = (gl.constexpr(place) for place in range(1, len(FUNCTIONS)))


@gluon.jit
def _load_right(weight, buffer, ready, across, features, column, GATED: gl.constexpr, BLOCK_N: gl.constexpr):
    """Rows of a weight: one block, or where gated a block of gates over the block of what they multiply."""
    if GATED:
        half: gl.constexpr = BLOCK_N // 2
        gates, values = buffer.slice(0, half), buffer.slice(half, half)
        tma.async_copy_global_to_shared(weight, [across * half, column], ready, gates)
        tma.async_copy_global_to_shared(weight, [features + across * half, column], ready, values)
    else:
        tma.async_copy_global_to_shared(weight, [across * BLOCK_N, column], ready, buffer)


@gluon.jit
def _load_tiles(
    codes, weight, outliers, outlier_weight, left_ring, right_ring, ready, empty,
    row_tiles, column_tiles, steps, outlier_steps, steps_shared, features,
    HAS_SLOTS: gl.constexpr, GATED: gl.constexpr, SHARES: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    turn = 0
    tiles = row_tiles * column_tiles
    for number in range(0, count_pieces(tiles, SHARES)):
        tile, first_step, last_step = piece(number, tiles, steps, steps_shared, SHARES)
        down, across = tile_place(tile, row_tiles, column_tiles, GROUP)
        for step in range(first_step, last_step):
            place = turn % BUFFERS
            mbarrier.wait(empty.index(place), ((turn // BUFFERS) & 1) ^ 1)
            mbarrier.expect(ready.index(place), (BLOCK_M + BLOCK_N) * BLOCK_K)
            tma.async_copy_global_to_shared(
                codes, [down * BLOCK_M, step * BLOCK_K], ready.index(place), left_ring.index(place)
            )
            _load_right(
                weight, right_ring.index(place), ready.index(place), across, features, step * BLOCK_K,
                GATED, BLOCK_N,
            )  # fmt: skip
            turn += 1
        if HAS_SLOTS:
            # The owner of a tile, who begins it, also ends it.
            for step in range(0, gl.where(first_step == 0, outlier_steps, 0)):
                place = turn % BUFFERS
                mbarrier.wait(empty.index(place), ((turn // BUFFERS) & 1) ^ 1)
                mbarrier.expect(ready.index(place), (BLOCK_M + BLOCK_N) * BLOCK_K)
                left = left_ring.index(place)._reinterpret(
                    outliers.dtype, [BLOCK_M, BLOCK_K // 2], outliers.layout
                )
                right = right_ring.index(place)._reinterpret(
                    outlier_weight.dtype, [BLOCK_N, BLOCK_K // 2], outlier_weight.layout
                )
                first_slot = step * (BLOCK_K // 2)
                tma.async_copy_global_to_shared(
                    outliers, [down * BLOCK_M, first_slot], ready.index(place), left
                )
                _load_right(
                    outlier_weight, right, ready.index(place), across, features, first_slot, GATED, BLOCK_N
                )
                turn += 1


@gluon.jit
def _rows_of_weight(across, features, GATED: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Which rows of the weight the columns of a tile are, and which of them exist."""
    column = gl.arange(0, BLOCK_N, layout)
    if GATED:
        half: gl.constexpr = BLOCK_N // 2
        feature = across * half + column % half
        weight_row = gl.where(column < half, feature, features + feature)
    else:
        feature = across * BLOCK_N + column
        weight_row = feature
    return weight_row, feature < features


@gluon.jit
def _halves(tile, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The left and the right half of a tile's columns; a thread keeps what it holds."""
    return gl.split(gl.permute(gl.reshape(tile, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))


@gluon.jit
def activated(x, FUNCTION: gl.constexpr):
    """The activation function of fp32 numbers."""
    if FUNCTION == _RELU:
        x = gl.where(x < 0.0, 0.0, x)
    elif FUNCTION == _SILU:
        x = x / (1.0 + gl.exp(-x))
    elif FUNCTION == _GELU:
        # The normal distribution's tail by Abramowitz and Stegun 7.1.26, of absolute error below 1e-7, at a
        # third of the instructions of erf.
        root = gl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * root)
        series = t * (
            0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        )
        tail = 0.5 * series * gl.exp(-root * root)
        x = x * gl.where(x < 0.0, tail, 1.0 - tail)
    elif FUNCTION == _GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + gl.exp(-2.0 * inner))
    return x


@gluon.jit
def _multiply_tiles(
    outliers, outlier_weight, out, scale, weight_scale, bias, partial_sums, handovers,
    left_ring, right_ring, staging, ready, empty,
    row_tiles, column_tiles, steps, outlier_steps, steps_shared, rows, features,
    HAS_SLOTS: gl.constexpr, HAS_BIAS: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr,
 SHARES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr, PARTS: gl.constexpr,
    INSTRUCTION: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    # The two layouts differ in the depth of an instruction only: converting moves no data.
    integer_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, INSTRUCTION, 32]
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, INSTRUCTION, 16]
    )
    turn = 0
    tiles = row_tiles * column_tiles
    for number in range(0, count_pieces(tiles, SHARES)):
        tile, first_step, last_step = piece(number, tiles, steps, steps_shared, SHARES)
        down, across = tile_place(tile, row_tiles, column_tiles, GROUP)
        row = down * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, integer_layout))
        row_scale = gl.load(scale + row, mask=row < rows, other=0.0)
        weight_row, inside = _rows_of_weight(
            across, features, GATED, BLOCK_N, gl.SliceLayout(0, integer_layout)
        )
        feature_scale = gl.load(weight_scale + weight_row, mask=inside, other=0.0)
        accumulator = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, integer_layout)
        for step in range(first_step, last_step):
            place = turn % BUFFERS
            mbarrier.wait(ready.index(place), (turn // BUFFERS) & 1)
            right = right_ring.index(place).permute((1, 0))
            accumulator = warpgroup_mma(left_ring.index(place), right, accumulator, is_async=True)
            accumulator = warpgroup_mma_wait(1, deps=(accumulator,))
            # All but the last product are done, so the buffer before this one is free.
            mbarrier.arrive(empty.index((turn + BUFFERS - 1) % BUFFERS), count=1, pred=step > first_step)
            turn += 1
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(empty.index((turn + BUFFERS - 1) % BUFFERS), count=1)
        owner = tile % gl.num_programs(0)
        if SHARES and first_step > 0:
            leave_sums(partial_sums, handovers, owner, accumulator, BLOCK_M, BLOCK_N)
        else:
            if SHARES and last_step < steps:
                # Not before the loop: where products begin with loaded sums, ptxas runs them one by one.
                accumulator = add_left_sums(partial_sums, handovers, owner, accumulator, BLOCK_M, BLOCK_N)
            result = accumulator.to(gl.float32)
            result = result * gl.expand_dims(row_scale, 1) * gl.expand_dims(feature_scale, 0)
            result = gl.convert_layout(result, layout)
            if HAS_SLOTS:
                for _ in range(0, outlier_steps):
                    place = turn % BUFFERS
                    mbarrier.wait(ready.index(place), (turn // BUFFERS) & 1)
                    left = left_ring.index(place)._reinterpret(
                        outliers.dtype, [BLOCK_M, BLOCK_K // 2], outliers.layout
                    )
                    right = right_ring.index(place)._reinterpret(
                        outlier_weight.dtype, [BLOCK_N, BLOCK_K // 2], outlier_weight.layout
                    )
                    result = warpgroup_mma(left, right.permute((1, 0)), result, is_async=True)
                    result = warpgroup_mma_wait(0, deps=(result,))
                    mbarrier.arrive(empty.index(place), count=1)
                    turn += 1
            if HAS_BIAS:
                bias_row, has_bias = _rows_of_weight(
                    across, features, GATED, BLOCK_N, gl.SliceLayout(0, layout)
                )
                added = gl.load(bias + bias_row, mask=has_bias, other=0.0).to(gl.float32)
                result += gl.expand_dims(added, 0)
            if GATED:
                gates, values = _halves(result, BLOCK_M, BLOCK_N)
                finished = activated(gates, FUNCTION) * values
                _store_part(out, staging, finished.to(out.dtype), down * BLOCK_M, across * (BLOCK_N // 2))
            else:
                result = activated(result, FUNCTION)
                rounded = result.to(out.dtype)
                if PARTS == 2:
                    left_half, right_half = _halves(rounded, BLOCK_M, BLOCK_N)
                    _store_part(out, staging, left_half, down * BLOCK_M, across * BLOCK_N)
                    _store_part(out, staging, right_half, down * BLOCK_M, across * BLOCK_N + BLOCK_N // 2)
                else:
                    _store_part(out, staging, rounded, down * BLOCK_M, across * BLOCK_N)
    tma.store_wait(pendings=0)


@gluon.jit
def _store_part(out, staging, part, first_row, first_feature):
    tma.store_wait(pendings=0)
    staging.store(part)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [first_row, first_feature], staging)


@gluon.jit(do_not_specialize=["rows", "steps_shared"])
def _specialized_warps(
    codes,  # [M, K] int8
    scale,  # [M] fp32
    outliers,  # [M, C]
    count,  # [1] int32
    weight,  # [N, K] int8
    weight_scale,  # [N] fp32
    outlier_weight,  # [N, C]
    bias,  # [N]
    out,  # [M, N], stored in PARTS of a tile; where gated [M, N / 2]
    partial_sums,  # int32, a tile for each owner
    handovers,  # int32, a flag for each owner
    rows,
    features,
    columns,
    steps_shared,
    HAS_SLOTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
    SHARES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BUFFERS: gl.constexpr,
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
    INSTRUCTION: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    left_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS, BLOCK_M, BLOCK_K], codes.layout)
    right_ring = gl.allocate_shared_memory(gl.int8, [BUFFERS, BLOCK_N, BLOCK_K], weight.layout)
    features_of_tile: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    staging = gl.allocate_shared_memory(out.dtype, [BLOCK_M, features_of_tile // PARTS], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(BUFFERS):
        mbarrier.init(ready.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    # The next launch is not let in early: its programs would crowd the processors that finish first.
    gdc_wait()
    row_tiles, column_tiles = gl.cdiv(rows, BLOCK_M), gl.cdiv(features, features_of_tile)
    steps = gl.cdiv(columns, BLOCK_K)
    outlier_steps = 0
    if HAS_SLOTS:
        outlier_steps = gl.cdiv(gl.load(count + _COUNT), BLOCK_K // 2)
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                outliers, outlier_weight, out, scale, weight_scale, bias, partial_sums, handovers,
                left_ring, right_ring, staging, ready, empty,
                row_tiles, column_tiles, steps, outlier_steps, steps_shared, rows, features,
                HAS_SLOTS, HAS_BIAS, FUNCTION, GATED, SHARES,
                BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS, GROUP, PARTS, INSTRUCTION, num_warps,
            )),
            (_load_tiles, (
                codes, weight, outliers, outlier_weight, left_ring, right_ring, ready, empty,
                row_tiles, column_tiles, steps, outlier_steps, steps_shared, features,
                HAS_SLOTS, GATED, SHARES, BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS, GROUP,
            )),
        ],
        [1],
        [REGISTERS],
    )  # fmt: skip


@functools.cache
def available(device: torch.device) -> bool:
    """Whether this kernel can run: Gluon is there, and the GPU is a Hopper."""
    return HAS_GLUON and not interpreting() and capability(device)[0] == 9


def _describe(matrix: Tensor, block: list[int]) -> Any:
    dtype = {torch.int8: gl.int8, torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[matrix.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor.from_tensor(matrix, block, layout)


def launch(
    codes: Tensor, scale: Tensor, outliers: Tensor, count: Tensor, weight: Tensor, weight_scale: Tensor,
    outlier_weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile, function: str = "none",
    gated: bool = False,
) -> None:  # fmt: skip
    """Takes 16-bit outliers and results and 8-bit weights, in matrices that descriptors can address.

    Where gated, the first half of the weight's rows makes gates for what the second half makes.
    """
    (rows, columns), features, slots = codes.shape, out.shape[1], outliers.shape[1]
    block_n = tile.features // 2 if gated else tile.features
    tiles = ceil_div(rows, tile.rows) * ceil_div(features, block_n)
    resident = 2 if tile.warps == 4 and 2 * shared_memory(tile) <= SHARED_MEMORY else 1
    programs = min(tiles, resident * multiprocessors(codes.device))
    handovers, partial_sums = None, None
    given = shared_steps(tiles, ceil_div(columns, DEPTH), programs) if tile == LARGEST_TILE else 0
    if given:
        handovers = handover_flags(codes.device)
    if handovers is None:
        given = 0
    else:
        sums = tiles % programs * tile.rows * tile.features
        partial_sums = torch.empty(sums, dtype=torch.int32, device=codes.device)
    left, right = [tile.rows, DEPTH // 2], [block_n, DEPTH // 2]
    parts = 1 if gated else parts_stored(tile)
    enqueue(
        _specialized_warps, (programs,),
        _describe(codes, [tile.rows, DEPTH]), scale,
        _describe(outliers, left) if slots else None, count,
        _describe(weight, [block_n, DEPTH]), weight_scale,
        _describe(outlier_weight, right) if slots else None, bias,
        _describe(out, [tile.rows, block_n // parts]), partial_sums, handovers,
        rows, features, columns, given,
        HAS_SLOTS=slots > 0, HAS_BIAS=bias is not None, FUNCTION=FUNCTIONS.index(function), GATED=gated,
        SHARES=given > 0,
        BLOCK_M=tile.rows, BLOCK_N=tile.features, BLOCK_K=DEPTH, BUFFERS=tile.buffers,
        GROUP=TILES_PER_GROUP, PARTS=parts,
        INSTRUCTION=min(tile.features, LARGEST_INTEGER_INSTRUCTION), REGISTERS=LOADING_WARP_REGISTERS,
        num_warps=tile.warps, launch_pdl=True, maxnreg=REGISTERS_FOR_TWO if resident > 1 else None,
    )  # fmt: skip
