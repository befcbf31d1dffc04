"""One graph of Dynamo's, several modules or parameters: each runs with its own packed weights."""

import pytest
import torch
from torch import nn

import mixq_compile as mixq


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return torch.relu(self.linear(x))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def relative_error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_layers_compiled_one_by_one_use_their_own_weights(lowering):
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer() for _ in range(3)]).eval().requires_grad_(False)
    for layer in layers:
        layer.compile(backend="mixq", options={"force": True, "lowering": lowering})
    x = torch.randn(64, 64)
    for turn in range(2):
        for number, layer in enumerate(layers):
            wanted = torch.relu(nn.functional.linear(x, layer.linear.weight, layer.linear.bias))
            error = relative_error(layer(x), wanted)
            assert error < 0.03, f"turn {turn}: layer {number} ran with other weights (error {error:.3f})"


def test_layers_compiled_one_by_one_with_changing_batches():
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer() for _ in range(2)]).eval().requires_grad_(False)
    for layer in layers:
        layer.compile(backend="mixq", dynamic=True, options={"force": True, "lowering": "aot_eager"})
    for rows in (8, 40, 17):
        x = torch.randn(rows, 64)
        for layer in layers:
            wanted = torch.relu(nn.functional.linear(x, layer.linear.weight, layer.linear.bias))
            assert relative_error(layer(x), wanted) < 0.03, f"{rows} rows"


def test_a_replaced_parameter_is_packed_anew():
    torch.manual_seed(0)
    layer = Layer().eval().requires_grad_(False)
    fast = torch.compile(layer, backend="mixq", options={"force": True, "lowering": "eager"})
    x = torch.randn(32, 64)
    fast(x)
    layer.linear.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    assert relative_error(fast(x), layer(x)) < 0.03
    assert len(mixq.report(fast).quantized) == 1
