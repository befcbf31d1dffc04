"""Every tensor that the package makes names its dtype and device: torch's defaults belong to the caller."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mixq_compile"

FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace",
    "logspace", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
)  # fmt: skip
LEGACY = ("Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "IntTensor", "LongTensor", "ByteTensor")
"""Constructors that take no dtype."""


def problems_of(source: str) -> list[str]:
    """Line and fault of each factory call in a source text that leaves a choice to torch's defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        named = {keyword.arg for keyword in node.keywords}
        if name in FACTORIES:
            missing = [argument for argument in ("dtype", "device") if argument not in named]
            if missing:
                found.append(f"{node.lineno}: torch.{name}(…) without {' and '.join(missing)}")
        elif name in LEGACY:
            found.append(f"{node.lineno}: torch.{name}(…) has torch's default dtype or device")
        elif name == "Generator" and not node.args and "device" not in named:
            found.append(f"{node.lineno}: torch.Generator() without device")
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_factory_calls_name_dtype_and_device(path: Path) -> None:
    found = problems_of(path.read_text())
    assert not found, f"{path.relative_to(PACKAGE.parent)}: " + "; ".join(found)


def test_this_test_sees_what_it_is_about() -> None:
    assert problems_of("x = torch.empty(3, 4)") == ["1: torch.empty(…) without dtype and device"]
    assert problems_of("torch.arange(3, dtype=torch.int64)") == ["1: torch.arange(…) without device"]
    assert problems_of("torch.tensor([1.0], device=d)") == ["1: torch.tensor(…) without dtype"]
    assert problems_of("torch.FloatTensor(3)") == [
        "1: torch.FloatTensor(…) has torch's default dtype or device"
    ]
    assert problems_of("torch.Generator().manual_seed(0)") == ["1: torch.Generator() without device"]
    assert problems_of("torch.zeros_like(x); x.new_zeros(3); torch.ones(2, dtype=t, device=d)") == []
