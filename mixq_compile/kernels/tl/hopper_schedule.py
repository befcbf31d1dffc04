# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Who computes which part of which output tile in the `hopper` kernel.

Tiles are dealt out in waves of one tile a program. Where the last wave would leave many programs idle,
the first tiles, one wave and the remainder, are *streamed*: their steps along K are cut into equal
ranges, one a program, regardless of where tiles end. Every range is at least a tile long, so that a tile
is shared by two programs at most: the next program begins its range with the end of the tile, and leaves
its sums in memory; the program that began the tile, with which its own range ends, starts from them. They
have been there for a while by then, and because they are integers the result does not depend on the cut.
(Osama et al., Stream-K, PPoPP 2023.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixq_compile.kernels.tl.toolkit import multiprocessors

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:
    from mixq_compile.kernels.tl import toolkit

    gluon, gl = toolkit.triton, toolkit.tl

STEPS_OF_A_HANDOVER = 8
"""What storing and fetching partial sums costs, in steps along K: streaming must save more."""
CAPTURED_LAUNCHES = 16384
"""How many streamed launches can be captured in CUDA graphs; further ones are not streamed."""


@gluon.jit
def tile_place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """As `tiles.tile_place`, which Gluon cannot call."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    height = min(row_tiles - first, GROUP)
    return first + (tile % per_group) % height, (tile % per_group) // height


@gluon.jit
def streamed_pieces(streamed, steps):
    """How many tiles this program's range of the streamed ones touches; 0 where none are streamed."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    begin = program * streamed * steps // programs
    end = (program + 1) * streamed * steps // programs
    return gl.cdiv(end, steps) - begin // steps


@gluon.jit
def count_pieces(tiles, streamed, steps):
    """How many pieces of work this program has."""
    whole = gl.cdiv(tiles - streamed - gl.program_id(0), gl.num_programs(0))
    return streamed_pieces(streamed, steps) + max(whole, 0)


@gluon.jit
def piece(number, streamed, steps):
    """Tile, first step and end of this program's piece of work `number`."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    begin = program * streamed * steps // programs
    end = (program + 1) * streamed * steps // programs
    shared = streamed_pieces(streamed, steps)
    tile = streamed + program + (number - shared) * programs
    first = 0
    last = steps
    if number < shared:
        tile = begin // steps + number
        first = max(begin - tile * steps, 0)
        last = min(end - tile * steps, steps)
    return tile, first, last


def streamed_tiles(tiles: int, steps: int, programs: int) -> int:
    """How many tiles to stream over so many programs; 0 where whole tiles leave too few of them idle."""
    remainder = tiles % programs
    if tiles <= programs or remainder == 0:
        return 0
    saved = (programs - remainder) * steps
    return programs + remainder if saved > STEPS_OF_A_HANDOVER * programs else 0


class Handovers:
    """Flags that say where partial sums are ready: a row for each launch that may run beside another.

    A launch leaves its row as it found it, zero. Launches on one stream follow each other and share a
    row; one captured in a graph has its own for good, since the graph may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._flags = torch.zeros(
            CAPTURED_LAUNCHES, multiprocessors(device) + 1, dtype=torch.int32, device=device
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
        if not capturing:
            self._row_of_stream[stream] = self._taken
        self._taken += 1
        return self._flags[self._taken - 1]


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
    return _HANDOVERS[device].row(capturing)
