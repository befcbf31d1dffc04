# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Who computes which part of which output tile in the `hopper` kernel.

Tiles are dealt out in waves of one tile a program. Where the last wave would leave many programs idle,
its tiles are *shared*: those programs become helpers, and take the last steps along K of each tile off
its owner. Helpers do that before their tile of the last full wave, owners come to the shared tile after
theirs, so that the helper's sums have been in memory for a while when the owner adds them to its own. They
are integers, so the result does not depend on the cut. An owner waits for its helper, and helpers for nobody:
they are the programs that start first, so that an owner never holds a multiprocessor that its helper needs,
whatever else runs on the device. This is Stream-K (Osama et al., PPoPP 2023) with ranges
that begin and end where tiles do: all programs but few go through K in step, on tiles beside each other,
and so read the same rows from the L2 cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl.plan_library import keep_flags
from mixq_compile.kernels.tl.plan_recording import note_flags
from mixq_compile.kernels.tl.toolkit import ceil_div, multiprocessors

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:
    from mixq_compile.kernels.tl import toolkit

    gluon, gl = toolkit.triton, toolkit.tl

STEPS_OF_A_HANDOVER = 2
"""What leaving or fetching sums costs, in steps along K."""
FEWEST_STEPS_GIVEN = 8
MOST_TILES_OF_A_HELPER = 4
CAPTURED_LAUNCHES = 16384
"""How many launches that share tiles can be captured in CUDA graphs; further ones do not share tiles."""


@gluon.jit
def tile_place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """As `tiles.tile_place`, which Gluon cannot call."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    height = min(row_tiles - first, GROUP)
    return first + (tile % per_group) % height, (tile % per_group) // height


@gluon.jit
def _number_of_program(SHARES: gl.constexpr):
    """This program's number in the schedule: helpers have the highest, and start first."""
    if SHARES:
        number = gl.num_programs(0) - 1 - gl.program_id(0)
    else:
        number = gl.program_id(0)
    return number


@gluon.jit
def count_pieces(tiles, SHARES: gl.constexpr):
    """How many pieces of work this program has."""
    program, programs = _number_of_program(SHARES), gl.num_programs(0)
    pieces = gl.cdiv(tiles - program, programs)
    if SHARES:
        shared = tiles % programs
        if program >= shared:
            pieces += gl.cdiv(shared - (program - shared), programs - shared)
    return pieces


@gluon.jit
def piece(number, tiles, steps, shared_steps, SHARES: gl.constexpr):
    """Tile, first step and end of this program's piece of work `number`.

    The last `shared_steps` steps of a shared tile are its helper's.
    """
    program, programs = _number_of_program(SHARES), gl.num_programs(0)
    tile = number * programs + program
    first = 0
    last = steps
    if SHARES:
        shared = tiles % programs
        waves = tiles // programs
        if program < shared:
            last = gl.where(number == waves, steps - shared_steps, steps)
        else:
            helper, helpers = program - shared, programs - shared
            turn = number - (waves - 1)
            helps = gl.cdiv(shared - helper, helpers)
            if (turn >= 0) & (turn < helps):
                tile = waves * programs + helper + turn * helpers
                first = steps - shared_steps
            if turn >= helps:
                tile = (waves - 1) * programs + program
    return tile, first, last


def shared_steps(tiles: int, steps: int, programs: int) -> int:
    """How many steps of each tile of the last wave to give to helpers; 0 where that saves too little."""
    shared = tiles % programs
    if tiles <= programs or shared == 0:
        return 0
    tiles_of_a_helper = ceil_div(shared, programs - shared)
    # Owner and helper end at the same time: steps - given = tiles_of_a_helper * (given + handover).
    given = (steps - tiles_of_a_helper * STEPS_OF_A_HANDOVER) // (tiles_of_a_helper + 1)
    worth_it = given >= FEWEST_STEPS_GIVEN and tiles_of_a_helper <= MOST_TILES_OF_A_HELPER
    return given if worth_it else 0


class Handovers:
    """Flags that say where partial sums are ready: a row for each launch that may run beside another.

    A launch leaves its row as it found it, zero. Launches on one stream follow each other and share a
    row; one captured in a graph has its own for good, since the graph may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._flags = torch.zeros(
            CAPTURED_LAUNCHES, multiprocessors(device), dtype=torch.int32, device=device
        )
        self._row_of_stream: dict[int, int] = {}
        self._taken = 0

    def row(self, capturing: bool) -> Tensor | None:
        """The flags of a launch on the current stream; None where all rows are taken."""
        stream = torch.cuda.current_stream(self._flags.device).cuda_stream
        if not capturing and stream in self._row_of_stream:
            return self._flags[self._row_of_stream[stream]]
        if self._taken == CAPTURED_LAUNCHES:
            return None
        row = self._flags[self._taken]
        if not capturing:
            self._row_of_stream[stream] = self._taken
            keep_flags(row, stream)
        self._taken += 1
        return row


_HANDOVERS: dict[torch.device, Handovers] = {}


def handover_flags(device: torch.device) -> Tensor | None:
    """Zeroed flags for one launch; None where a graph is captured and no launch came before to make them."""
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _HANDOVERS:
        if capturing:
            return None
        _HANDOVERS[device] = Handovers(device)
        # Other streams may use them next.
        torch.cuda.synchronize(device)
    row = _HANDOVERS[device].row(capturing)
    if row is not None:
        note_flags(row)
    return row
