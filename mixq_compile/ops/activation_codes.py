"""Integer codes of an activation: how many bits they have, told by the text of their format."""

from __future__ import annotations

import functools

from mixq_compile.errors import OptionError
from mixq_compile.formats import INT4, INT8, TensorFormat

COMPUTED = (INT8, INT4)
"""What quantizations write: signed codes, one in a byte whatever their width, and a scale for each row."""


@functools.lru_cache(maxsize=256)
def code_bits(format: str) -> int:
    """Bits of the codes of an activation in a format such as `int8`: 8 or 4.

    Looked up, not parsed, in every call. Raises OptionError for a text that names no format, and for a
    format that no quantization writes.
    """
    parsed = TensorFormat.parse(format)
    if parsed not in COMPUTED:
        raise OptionError(
            f"activations are quantized to {' or '.join(map(str, COMPUTED))}, one scale a row, not to "
            f"{format}: choose one of those as the activation's format."
        )
    return parsed.bits


@functools.lru_cache(maxsize=256)
def largest_code(format: str) -> int:
    """The largest code of an activation in a format: 127 or 7. Raises OptionError as `code_bits` does."""
    return (1 << (code_bits(format) - 1)) - 1
