"""Runs under other defaults of torch: another default dtype, and a default device where nothing belongs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

DEFAULTS = ("bfloat16", "float16", "float64", "device meta")


@contextlib.contextmanager
def default(name: str) -> Iterator[None]:
    """Another default dtype, or meta as a stand-in for a device that is not the model's."""
    before = torch.get_default_dtype()
    try:
        if name.startswith("device"):
            torch.set_default_device(name.split()[1])
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def assert_unchanged(name: str, run: Callable[[], Any]) -> None:
    """Fails where a run under this default gives other bits, dtypes or devices than one under torch's own."""
    expected, _ = tree_flatten(run())
    with default(name):
        found, _ = tree_flatten(run())
    assert len(found) == len(expected)
    assert any(isinstance(item, Tensor) and item.numel() for item in expected), "nothing is compared"
    for place, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
        where = f"item {place} under the default {name}"
        if not isinstance(wanted, Tensor):
            assert mine == wanted, where
            continue
        assert (mine.dtype, mine.device) == (wanted.dtype, wanted.device), where
        torch.testing.assert_close(
            mine, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda text, w=where: f"{w}: {text}"
        )
