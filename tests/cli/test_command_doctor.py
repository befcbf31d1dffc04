from typing import Any

import pytest
from commands import mixq, mixq_json

from mixq_compile.cli import doctor
from mixq_compile.ops.providers import operators
from mixq_compile.schemes.registry import scheme_names


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return doctor.examine()


def test_everything_is_examined(found: dict[str, Any]) -> None:
    assert found["backend"] == "mixq_compile.runtime.backend:mixq_backend"
    assert set(found["schemes"]) == set(scheme_names())
    assert {row["operator"] for row in found["kernels"]} == set(operators())
    reference = [row for row in found["kernels"] if row["provider"] == "ref"]
    assert all(row["supported"] for row in reference)
    assert all(row["reason"] for row in found["kernels"] if not row["supported"])


def test_json(found: dict[str, Any]) -> None:
    shown = mixq_json("doctor", code=1 if found["problems"] else 0)
    assert shown["kernels"] == found["kernels"]


def test_text(found: dict[str, Any]) -> None:
    shown = mixq("doctor", code=1 if found["problems"] else 0).stdout
    assert "mixed_linear" in shown
    assert "w8a8o16" in shown


def test_no_compiler_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    shown = mixq("doctor", code=1).stdout
    assert "no C++ compiler" in shown
    assert "apt-get install g++" in " ".join(shown.split())


def test_a_backend_that_torch_does_not_find_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BACKENDS", "no_such_group")
    (problem, *_) = doctor.examine()["problems"]
    assert 'torch does not find backend="mixq"' in problem
