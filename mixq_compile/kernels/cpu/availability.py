"""Whether the kernels can serve a call: a compiler at hand, a self-test passed."""

from __future__ import annotations

import functools
from ctypes import byref

import torch

from mixq_compile.errors import KernelError
from mixq_compile.kernels.cpu.build import library
from mixq_compile.kernels.cpu.interface import CPU, LinearArguments, WeightCodes, type_number
from mixq_compile.ops.providers import KernelQuery, refused_format

PRIORITY = 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _product_is_exact(rows: int) -> bool:
    """Whether codes of every size, the extremes in long runs, give their exact sums."""
    columns, features = 203, 133
    generator = torch.Generator(CPU).manual_seed(0)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=CPU, generator=generator)
    weight = torch.randint(-128, 128, (features, columns), dtype=torch.int8, device=CPU, generator=generator)
    # Runs of the largest products overflow instructions that add pairs in 16 bits.
    codes[0], weight[0], weight[1] = 127, 127, -128
    found = torch.empty(rows, features, dtype=torch.int32, device=CPU)
    arguments = LinearArguments(
        codes=codes.data_ptr(), weight=WeightCodes.of(weight, columns), result=found.data_ptr(), rows=rows,
        codes_stride=columns, result_type=type_number(torch.int32), threads=torch.get_num_threads(),
    )  # fmt: skip
    library().mixq_mixed_linear(byref(arguments))
    return torch.equal(found.double(), codes.double() @ weight.double().T)


@functools.cache
def reason_unavailable() -> str | None:
    """Why the kernels cannot be used in this process; None where they can. Compiles them if need be."""
    try:
        library()
    except KernelError as error:
        return str(error)
    if not all(_product_is_exact(rows) for rows in (1, 19)):
        return "its integer product failed the self-test on this processor: please report this as a bug"
    return None


def supports(query: KernelQuery) -> bool | str:
    """True, or why these kernels do not serve the call."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, not on {query.device.type}"
    if query.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    return refused_format(query) or reason_unavailable() or True
