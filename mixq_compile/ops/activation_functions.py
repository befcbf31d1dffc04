"""The activation functions that kernels apply to a linear's result: one list for operators and providers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from mixq_compile.errors import unknown_name

NONE = "none"
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    NONE: torch.clone,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
"""What each is; `gelu` is the exact one, by the error function. Kernels number them in this order."""
ACTIVATED = tuple(name for name in FUNCTIONS if name != NONE)
"""Those of `activated_linear`."""
QUANTIZING = (NONE, "relu", "gelu")
"""Those of `quantized_linear`, which the C++ kernels number in this order."""


def check_function(name: str, valid: Collection[str]) -> None:
    """Raises OptionError, which lists the valid functions, for any other."""
    if name not in valid:
        raise unknown_name("activation function", name, valid)
