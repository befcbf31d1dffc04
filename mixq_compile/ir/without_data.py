"""Tensors that have a shape and a dtype and no data: models of any size are inspected on them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def shapes_only() -> AbstractContextManager[Any]:
    """A context in which new tensors take no memory."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def has_data(tensor: Tensor) -> bool:
    """False for a tensor whose elements do not exist."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
