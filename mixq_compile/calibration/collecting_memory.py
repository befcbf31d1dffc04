"""What collecting statistics costs in memory, said before it is spent."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from mixq_compile.calibration.collected import FURTHER
from mixq_compile.errors import MixqError
from mixq_compile.ir.free_memory import free_bytes

log = logging.getLogger(__name__)

RESERVE = 0.05
"""Part of the free memory that collecting must leave."""


def check_memory(linears: Sequence[tuple[int, torch.device]], kinds: Sequence[str]) -> None:
    """Says what statistics of linears with so many input channels on these devices take at most.

    Raises MixqError where a device lacks the memory. Linears that read one input need it once; which
    do is known only afterwards, so each is counted.
    """
    cpu = torch.device("cpu")
    needed: Counter[torch.device] = Counter()
    for kind in kinds:
        if kind in FURTHER:
            for in_features, device in linears:
                needed[device] += FURTHER[kind].working_bytes(in_features)
                needed[cpu] += FURTHER[kind].value_bytes(in_features)
    further = " and ".join(kind for kind in kinds if kind in FURTHER)
    for device, size in needed.items():
        available = free_bytes(device)
        if available is not None and size > available * (1 - RESERVE):
            raise MixqError(
                f"collecting the {further} of {len(linears)} linears needs up to {size / 2**30:.2f} GiB on "
                f"{device}, which has {available / 2**30:.2f} GiB free. Move the model to a device with more "
                "memory, or leave a kind out: the gram takes the most, 12 bytes for each of K x K entries."
            )
        log.info(
            "collecting the %s of %d linears takes up to %.2f GiB on %s",
            further, len(linears), size / 2**30, device,
        )  # fmt: skip
