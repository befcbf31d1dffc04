"""Data inside a page: JSON, compressed, as text that a browser and `read_island` both can read."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

from mixq_compile.errors import OptionError

IDENTIFIER = "mixq-data"
_ISLAND = re.compile(rf'<script id="{IDENTIFIER}"[^>]*>([A-Za-z0-9+/=\s]*)</script>')


def island(data: Any) -> str:
    """The script element that holds the data. The bytes are the same for the same data."""
    packed = gzip.compress(
        json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), compresslevel=9, mtime=0
    )
    text = base64.b64encode(packed).decode()
    return f'<script id="{IDENTIFIER}" type="application/gzip;base64">{text}</script>'


def read_island(page: str) -> Any:
    """The data of a page that `island` is part of. Raises OptionError where there is none."""
    match = _ISLAND.search(page)
    if match is None:
        raise OptionError("this page holds no data of mixq: it is no report.")
    try:
        return json.loads(gzip.decompress(base64.b64decode(match[1])))
    except (ValueError, EOFError, OSError) as error:
        raise OptionError(f"the data of this report cannot be read ({error}): it may be cut off.") from error
