"""Schemes that are no module of the package: objects given as options, and entry points of other packages."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mixq_compile as mixq
from mixq_compile.errors import OptionError
from mixq_compile.scheme import OutlierPolicy, QuantScheme
from mixq_compile.schemes import registry
from mixq_compile.schemes.registry import get_scheme, register, scheme_names

WIDE = dataclasses.replace(
    get_scheme("w8a8o16"), name="w8a8o16_mine", outliers=OutlierPolicy(threshold=2.0, capacity=32)
)
MODULE = """
import dataclasses
from mixq_compile.schemes.registry import get_scheme
SCHEME = dataclasses.replace(get_scheme("w8a8o16"), name="{name}").with_outliers(capacity=48)
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).eval().requires_grad_(False)


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, module: str) -> None:
    """A package with one entry point, as an installer leaves it."""
    facts = folder / "other_schemes-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: other-schemes\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{name} = {value}\n")
    (folder / "other_schemes.py").write_text(module)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "other_schemes", raising=False)


def capacities(compiled: Any) -> dict[str, tuple[str | None, int]]:
    return {linear.fqn: (linear.scheme, linear.capacity) for linear in mixq.report(compiled).quantized}


def test_an_object_is_taken_as_an_option_by_every_way_in() -> None:
    x = torch.randn(40, 64)
    swapped = mixq.quantize(model(), WIDE)
    options = {"scheme": WIDE, "force": True, "lowering": "eager"}
    fast = torch.compile(model(), backend="mixq", options=options)
    fast(x)
    assert capacities(swapped) == capacities(fast) == {"0": (WIDE.name, 32), "1": (WIDE.name, 32)}
    mixed = mixq.quantize(model(), "w8a8", layers={"1": WIDE})
    assert capacities(mixed) == {"0": ("w8a8", 0), "1": (WIDE.name, 32)}
    assert WIDE.name in scheme_names()


def test_a_name_means_one_scheme() -> None:
    register(WIDE)
    register(dataclasses.replace(WIDE))
    assert get_scheme(WIDE.name) == WIDE
    with pytest.raises(OptionError, match="another scheme is called 'w8a8o16_mine'"):
        register(dataclasses.replace(WIDE, solver="clip"))
    for name in ("w8a8", "eetq"):
        with pytest.raises(OptionError, match=f"another scheme is called '{name}'"):
            mixq.quantize(model(), dataclasses.replace(WIDE, name=name))
    with pytest.raises(OptionError, match="letters, digits and underscores, not 'my scheme'"):
        register(dataclasses.replace(WIDE, name="my scheme"))


def test_an_entry_point_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "theirs", "other_schemes:SCHEME", MODULE.format(name="theirs"))
    assert "theirs" in scheme_names()
    assert capacities(mixq.quantize(model(), "theirs"))["0"] == ("theirs", 48)


@pytest.mark.parametrize(
    ("value", "module", "message"),
    [
        ("other_schemes:SCHEME", MODULE.format(name="another"), "which is a scheme called 'another'"),
        ("other_schemes:SCHEME", "SCHEME = 3", "which is 3 and must be a QuantScheme"),
        ("other_schemes:SCHEME", "1 / 0", "which failed: ZeroDivisionError"),
        ("no_such_module:SCHEME", "", "which failed: ModuleNotFoundError"),
    ],
)
def test_a_broken_entry_point_says_whose_it_is(
    value: str, module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, monkeypatch, "theirs", value, module)
    with pytest.raises(OptionError, match=f"entry point '{value}' of another package, {message}"):
        mixq.quantize(model(), "theirs")
    assert isinstance(get_scheme("w8a8"), QuantScheme), "others are not hurt"


def test_a_name_of_this_package_is_this_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "w8a8", "other_schemes:SCHEME", MODULE.format(name="w8a8"))
    assert get_scheme("w8a8").outliers is None
