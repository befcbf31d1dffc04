"""The reference of quantize_affine and grouped_linear on a GPU: the same codes, the same products."""

from __future__ import annotations

import pytest
import torch
from operator_calls import ARGUMENTS, OPERATORS, SHAPES, Shape, tensors
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("label", ["plain", "three_dimensions", "one_row", "no_rows", "ragged", "four_bits"])
@pytest.mark.parametrize("operator", ["quantize_affine", "grouped_linear"])
def test_a_gpu_computes_what_the_cpu_does(operator: str, label: str) -> None:
    shape: Shape = SHAPES[label]
    arguments = ARGUMENTS[operator](tensors(shape), shape)
    moved = [item.cuda() if isinstance(item, Tensor) else item for item in arguments]
    here, there = OPERATORS[operator](*arguments), OPERATORS[operator](*moved)
    pairs = zip(here, there, strict=True) if isinstance(here, tuple) else [(here, there)]
    for expected, found in pairs:
        assert found.is_cuda
        torch.testing.assert_close(
            found.cpu(), expected, rtol=1e-6 if found.is_floating_point() else 0, atol=0
        )
