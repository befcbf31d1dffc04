"""Captures a model with torch.export, runs a pipeline over it, and prints every pass and decision.

python examples/ahead_of_time.py
"""

import torch
from torch import nn

import mixq_compile as mixq


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    x = torch.randn(64, 256)
    x[:, 11] *= 50  # an outlier channel

    stats = mixq.calibrate(model, [(x,)])
    program = mixq.capture(model, (x,))
    compiled, history = mixq.compile(program, "aot", stats=stats, force=True)

    history.print()
    exact = model(x)
    relative_error = ((compiled.module()(x) - exact).norm() / exact.norm()).item()
    print(f"relative error of the output: {relative_error:.4f}")


if __name__ == "__main__":
    main()
