"""What quantizing on the fly costs in memory, said before it is spent."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.weight_store import STORE
from mixq_compile.scheme import get_scheme

log = logging.getLogger(__name__)

WORTH_SAYING = 1 << 30
"""Bytes of 16-bit weights from which the one message about both copies is a warning."""
RESERVE = 0.05
"""Part of the free memory that packing must leave."""

REMEDIES = (
    "mixq_compile.quantize(model) swaps the linears before compiling and frees their 16-bit weights, and "
    "options={'release_weights': True} frees them after compiling"
)
_said: set[int] = set()


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024


def check(weights: list[Tensor], options: MixqOptions) -> None:
    """Says once what packing these weights keeps in memory; raises MixqError where it does not fit."""
    unpacked = [weight for weight in weights if not weight.is_meta and not STORE.packed(weight)]
    if not unpacked:
        return
    held = sum(weight.nbytes for weight in unpacked)
    bits = get_scheme(options.scheme).weight.bits
    needed = sum(weight.numel() for weight in unpacked) * bits // 8
    available = free_bytes(unpacked[0].device)
    if available is not None and needed > available * (1 - RESERVE):
        raise MixqError(
            f"packing {len(unpacked)} weights needs {needed / 2**30:.2f} GiB beside the {held / 2**30:.2f} GiB "
            f"they have, and {unpacked[0].device} has {available / 2**30:.2f} GiB free. {REMEDIES}."
        )
    if options.release_weights or id(weights[0]) in _said:
        return
    _said.add(id(weights[0]))
    log.log(
        logging.WARNING if held >= WORTH_SAYING else logging.INFO,
        "the model keeps its weights (%.2f GiB) beside the packed ones (%.2f GiB): %.2f times the memory. %s.",
        held / 2**30, needed / 2**30, 1 + needed / held, REMEDIES,
    )  # fmt: skip
