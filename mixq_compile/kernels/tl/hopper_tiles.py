"""The output tiles of the `hopper` kernel, and which one suits a call."""

from __future__ import annotations

from typing import NamedTuple

from mixq_compile.kernels.tl.toolkit import ceil_div

DEPTH = 128
"""Bytes of K in one buffer: 128 codes, or 64 outlier columns of 16 bits."""
SHARED_MEMORY = 232448 - 2048


class Tile(NamedTuple):
    """Rows and columns of an output tile, buffers in the ring, and warps that multiply."""

    rows: int
    features: int
    buffers: int
    warps: int


def shared_memory(tile: Tile) -> int:
    """Bytes of shared memory a program of this tile takes, barriers aside."""
    staging = tile.rows * tile.features * 2 // parts_stored(tile)
    return tile.buffers * (tile.rows + tile.features) * DEPTH + staging


def parts_stored(tile: Tile) -> int:
    """In how many parts a program stores its tile."""
    return 2 if tile.features > 128 else 1


LARGEST_TILE = Tile(128, 256, 4, 8)
"""The only one that is shared: the others are for calls with little work."""
TILES = (
    (64, (Tile(64, 128, 6, 4), Tile(64, 64, 6, 4), Tile(64, 32, 8, 4))),
    (128, (Tile(128, 128, 6, 8), Tile(128, 64, 8, 8))),
    (256, (Tile(64, 128, 8, 4), Tile(64, 64, 6, 4))),
    (768, (Tile(128, 128, 6, 8), Tile(64, 128, 8, 4))),
    (None, (LARGEST_TILE, Tile(128, 128, 6, 8), Tile(64, 128, 8, 4))),
)
"""Up to so many rows: the tiles to choose from, the one that reads least first."""


def choose_tile(rows: int, features: int, programs: int) -> Tile:
    """The first tile that gives work to at least 60 % of so many multiprocessors, else the last."""
    candidates = next(tiles for most, tiles in TILES if most is None or rows <= most)
    for tile in candidates:
        if 10 * ceil_div(rows, tile.rows) * ceil_div(features, tile.features) >= 6 * programs:
            return tile
    return candidates[-1]
