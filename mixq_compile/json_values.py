"""Data as JSON has it: infinities and NaN, which JSON lacks, as texts."""

from __future__ import annotations

import math
from typing import Any


def finite(data: Any) -> Any:
    """The data with infinities and NaN as texts that `float` reads, and tuples as lists."""
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data
