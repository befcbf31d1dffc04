"""What a device reaches at most, measured in a moment: for the roofline of `mixq layers`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mixq_compile.errors import OptionError
from mixq_compile.inspection.cost import H200, DeviceFigures
from mixq_compile.ops.mixed_linear import mixed_linear
from mixq_compile.ops.providers import AUTO

SIZE = 1024
COPY_BYTES = 64 << 20
REPETITIONS = 5
OUTLIER_SLOTS = 16
PARTS = ("float", "int8", "bandwidth")
UNITS = {"float": 1e12, "int8": 1e12, "bandwidth": 1e9}
KNOWN = {"h200": H200}


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


@torch.no_grad()
def measure_figures(device: torch.device) -> DeviceFigures:
    """Times a product in floating point, this package's own in int8, and a copy; takes about a second."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    enlarged = 1 if device.type == "cpu" else 8
    size = SIZE * enlarged
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    codes = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
    scale = torch.ones(size, device=device, dtype=torch.float32)
    outliers = torch.zeros(size, OUTLIER_SLOTS, device=device, dtype=dtype)
    count = torch.zeros(1, device=device, dtype=torch.int32)

    def integer_product() -> torch.Tensor:
        operands = (matrix, codes, scale, outliers, count, codes, scale, outliers, None, 0, AUTO)
        return mixed_linear(*operands)  # type: ignore[no-any-return]

    source = torch.zeros(COPY_BYTES * enlarged, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    operations = 2 * size**3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return DeviceFigures(
        name=f"{name}, measured",
        float_rate=operations / _best_seconds(lambda: matrix @ matrix.t(), device),
        integer_rate=operations / _best_seconds(integer_product, device),
        bandwidth=2 * source.numel() / _best_seconds(lambda: target.copy_(source), device),
    )


def figures_of(text: str, device: torch.device) -> DeviceFigures:
    """The figures that a text means: `auto`, `h200`, `measure`, or `float=…,int8=…,bandwidth=…`.

    Rates are given in 10¹² operations a second (2 for each product), the bandwidth in GB/s. `auto` is the
    H200 for models on a GPU, and a measurement for models on a CPU. Raises OptionError for anything else.
    """
    if text in KNOWN:
        return KNOWN[text]
    if text == "auto" and device.type == "cuda":
        return H200
    if text in ("auto", "measure"):
        return measure_figures(device)
    given: dict[str, float] = {}
    for part in text.split(","):
        key, sign, value = part.partition("=")
        try:
            given[key.strip()] = float(value) * UNITS[key.strip()]
        except (KeyError, ValueError):
            sign = ""
        if not sign:
            break
    if set(given) != set(PARTS) or not sign:
        raise OptionError(
            f"figures of a device are auto, {', '.join(KNOWN)}, measure, or all of float=TFLOP/s,int8=TOP/s,"
            f"bandwidth=GB/s, such as float=990,int8=1979,bandwidth=3350; not {text!r}."
        )
    return DeviceFigures("given figures", given["float"], given["int8"], given["bandwidth"])
