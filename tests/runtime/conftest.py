"""Each test compiles afresh, and says again what is said once a process."""

from collections.abc import Iterator

import pytest
import torch

from mixq_compile.runtime import compiled_graph


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    compiled_graph._say_that_gradients_are_off.cache_clear()
    yield
    torch._dynamo.reset()
