"""Whether two trees compute the same bits: hashes of what small quantized models give on the CPU.

Each scheme, way into it and dtype, with several shapes and miss policies, on models with planted outliers.

PYTHONPATH=TREE python benchmarks/bit_equality.py --output before.json
PYTHONPATH=OTHER_TREE python benchmarks/bit_equality.py --output after.json
python benchmarks/bit_equality.py --compare before.json after.json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixq_compile as mixq

SCHEMES = ("w8a8o16", "w4a8o16", "w4a4o16", "w8a8", "w8a16")
DTYPES = (torch.float32, torch.bfloat16)
LEARNING = ("exact", "lazy", "frozen", "static", "per_call")
"""Miss policies; schemes without outliers have none."""
OUTLIER = 40.0
THRESHOLD = 6.0
"""Given to every tree, because defaults may differ."""

Runs = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its inputs."""

    rows: tuple[int, ...]
    in_features: int
    hidden: int


SHAPES = (Shape((7,), 64, 96), Shape((2, 3), 51, 77), Shape((1,), 128, 64))
"""Even sizes, sizes that fill no vector, and one row."""


class Block(nn.Module):
    """Two linears that read one value, a gate, and one that reads their product."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.in_features, shape.hidden, bias=False)
        self.up_proj = nn.Linear(shape.in_features, shape.hidden)
        self.down_proj = nn.Linear(shape.hidden, shape.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Rows through the block."""
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


def model_of(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """The same weights in every tree, with a column that makes outliers of its output."""
    generator = torch.Generator().manual_seed(0)
    model = Block(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.up_proj.weight[5] *= 12
    return model.to(dtype).eval()


def inputs_of(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Three batches; from one to the next other columns exceed the threshold."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for columns in ((3,), (3, 17), (40,)):
        x = torch.randn(*shape.rows, shape.in_features, generator=generator).clamp_(-4, 4)
        x[..., list(columns)] *= OUTLIER
        found.append(x.to(dtype))
    return found


def _backend(model: nn.Module, example: Tensor, scheme: str, options: dict[str, Any]) -> Runs:
    torch._dynamo.reset()
    chosen = {"scheme": scheme, "force": True, "lowering": "eager", **options}
    return torch.compile(model, backend="mixq", options=chosen)  # type: ignore[no-any-return]


def _quantized(model: nn.Module, example: Tensor, scheme: str, options: dict[str, Any]) -> Runs:
    keeps = not options.get("stats")
    return mixq.quantize(model, scheme, force=True, keep_originals=keeps, **options)  # type: ignore[no-any-return]


def _exported(model: nn.Module, example: Tensor, scheme: str, options: dict[str, Any]) -> Runs:
    graph, _ = mixq.compile(mixq.capture(model, example), scheme=scheme, force=True, **options)
    return graph.module()  # type: ignore[no-any-return]


ROUTES: dict[str, Callable[..., Runs]] = {"backend": _backend, "quantize": _quantized, "export": _exported}


def _options(
    model: nn.Module, inputs: list[Tensor], scheme: str, route: str, miss: str | None
) -> dict[str, Any]:
    """What the case needs: the fixed columns of `static`, and of 4-bit weights without originals."""
    options: dict[str, Any] = {"threshold": THRESHOLD}
    if miss:
        options["miss"] = miss
    if miss in ("static", "frozen") or (route == "export" and scheme.startswith("w4")):
        options["stats"] = mixq.calibrate(model, inputs[:1], progress=False)
    if route == "export" and scheme.startswith("w4") and miss is None:
        options["miss"] = "frozen"
    return options


def _digest(values: list[Tensor]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """The name of each case, and what computes its hash."""
    for scheme, route, dtype, (number, shape) in itertools.product(
        SCHEMES, ROUTES, DTYPES, enumerate(SHAPES)
    ):
        policies: tuple[str | None, ...] = (None,)
        if scheme.endswith("o16") and number == 0:
            fixed = route == "export" and scheme.startswith("w4")
            policies = ("frozen", "static") if fixed else LEARNING
        for miss in policies:
            name = f"{scheme} {route} {str(dtype).removeprefix('torch.')} {number} {miss or 'default'}"

            def compute(scheme=scheme, route=route, dtype=dtype, shape=shape, miss=miss) -> str:  # type: ignore[no-untyped-def]
                inputs = inputs_of(shape, dtype)
                with torch.no_grad():
                    model = model_of(shape, dtype)
                    options = _options(model, inputs, scheme, route, miss)
                    run = ROUTES[route](model, inputs[0], scheme, options)
                    return _digest([run(x) for x in inputs])

            yield name, compute


def compare(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """Names of the cases that differ, or that only one of two trees has."""
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def main() -> None:
    """Writes the hashes, or compares two files of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the hashes of the tree on the path here")
    parser.add_argument("--compare", type=Path, nargs="+", help="two files, or one and the tree on the path")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    files = [json.loads(path.read_text()) for path in given.compare or ()]
    if len(files) < 2:
        found = {}
        for name, compute in cases():
            found[name] = compute()
            print(f"{found[name]}  {name}")
        print(f"{len(found)} cases, {len(set(found.values()))} different hashes")
        if given.output:
            given.output.write_text(json.dumps(found, indent=1) + "\n")
        files.append(found)
    if given.compare:
        different = compare(*files[:2])
        for name in different:
            print(f"differs: {name}\n  {files[0].get(name)}\n  {files[1].get(name)}")
        print(f"{len(files[0])} cases, {len(different)} differ")
        raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
