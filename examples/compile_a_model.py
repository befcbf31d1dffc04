"""Compiles an ordinary model with the backend and prints what was done to it.

python examples/compile_a_model.py
"""

import torch
from torch import nn

import mixq_compile as mixq


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    model.eval().requires_grad_(False)
    model[0].weight[7] = 40.0  # one channel far larger than the rest, as trained models have
    x = torch.randn(256, 512)

    # force quantizes every linear, so that the example says the same on a machine where int8 does not win.
    fast = torch.compile(model, backend="mixq", options={"force": True})
    exact = model(x)
    relative_error = ((fast(x) - exact).norm() / exact.norm()).item()

    print(mixq.report(fast))
    print(f"relative error of the output: {relative_error:.4f}")


if __name__ == "__main__":
    main()
