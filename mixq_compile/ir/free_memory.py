"""How much memory of a device is free."""

from __future__ import annotations

import torch


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
