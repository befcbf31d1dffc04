"""What was measured: where the weight-only kernels are faster, and the gain over 16 bit."""

from __future__ import annotations

import functools
import logging

import torch

from mixq_compile.kernels.tl import tuning
from mixq_compile.kernels.tl.speed_table import save, shipped, tuned
from mixq_compile.ops.providers import KernelQuery

log = logging.getLogger(__name__)

SMALL_BATCH = 16
SMALL_BATCHES_OF_NARROW = ((4096, 32), (8192, 20))
"""Up to so many out_features, the largest M that the weight-only kernels serve better."""
FOUR_BIT_SMALL_BATCH = 64
LARGEST_ROWS = 8192


def small_batch(query: KernelQuery) -> int:
    """The largest M that the weight-only kernels serve better."""
    if query.weight.bits == 4:
        return FOUR_BIT_SMALL_BATCH
    features = query.out_features
    fitting = (rows for most, rows in SMALL_BATCHES_OF_NARROW if features is not None and features <= most)
    return next(fitting, SMALL_BATCH)


@functools.cache
def device_name(device: torch.device) -> str:
    """The GPU's name; empty where there is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def bucket(rows: int) -> int:
    """The number of rows to measure for this one: the next power of two."""
    return min(1 << (max(rows, 1) - 1).bit_length(), LARGEST_ROWS)


def speedup(query: KernelQuery, rows: int) -> float | None:
    """Time of the 16-bit linear over ours at M = rows.

    From this machine's own measurements (`mixq tune`); else from the shipped ones of this GPU, by the
    nearest shape; on a GPU without any, measured now and kept. None for fp32, for unknown shapes, and
    where a graph is being captured.
    """
    if query.in_features is None or query.out_features is None or query.dtype == torch.float32:
        return None
    name = device_name(query.device)
    shape = (query.weight.bits, query.out_features, query.in_features)
    own = tuned(name)
    table = shipped(name)
    if table is not None:
        found = own.at(shape, rows)
        return found if found is not None else table.near(shape, rows)
    wanted = bucket(rows)
    if wanted in own.entries.get(shape, {}):
        return own.entries[shape][wanted]
    if not name or not tuning.can_measure(query):
        return None
    log.info("measuring %s on %s at %s rows, once: mixq tune does it ahead", shape, name, wanted)
    found = tuning.measure_into(own, query, wanted)
    save(own)
    return found
