"""Operators keep what `torch.library.custom_op` gives: schemas, counted writes, refusals, no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import KernelError, MixqError
from mixq_compile.ops import registration
from mixq_compile.ops.registration import operator


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library whose operators are gone after the test, so that no other test meets them."""
    library = torch.library.Library("mixq", "FRAGMENT")
    monkeypatch.setattr(registration, "_LIBRARY", library)
    yield
    library._destroy()


def halve_into(x: Tensor, total: Tensor, others: Sequence[Tensor], note: str) -> Tensor:
    """Returns x / 2; adds it to total and to each of others."""
    if note == "returns x":
        return x
    total += x / 2
    for other in others:
        other += x / 2
    return x / 2


def tried() -> Any:
    found = operator("mixq::tried", mutates_args=("total", "others"))(halve_into)
    found.register_fake(lambda x, *others: torch.empty_like(x))
    return found


def operands() -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.ones(3), torch.zeros(3), [torch.zeros(3), torch.zeros(3)]


@pytest.mark.usefixtures("space")
def test_the_schema_is_that_of_a_custom_op() -> None:
    expected = torch.library.infer_schema(halve_into, mutates_args=("total", "others"))
    assert str(tried()._opoverload._schema) == f"mixq::tried{expected}"


@pytest.mark.usefixtures("space")
def test_it_is_called_by_itself_and_by_its_overload_and_with_names() -> None:
    found = tried()
    for call in (found, torch.ops.mixq.tried.default):
        x, total, others = operands()
        assert torch.equal(call(x, total, others=others, note=""), x / 2)
        assert torch.equal(total, x / 2)
        assert all(torch.equal(other, x / 2) for other in others)


@pytest.mark.usefixtures("space")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_writes_are_counted(mode: Any) -> None:
    found = tried()
    x, total, others = operands()
    before = [each._version for each in (x, total, *others)]
    with mode():
        found(x, total, others, "")
    counted = [each._version - old for each, old in zip((x, total, *others), before, strict=True)]
    assert counted[0] == 0, "x is only read"
    assert all(count > 0 for count in counted[1:]), f"writes that nobody can see: {counted}"


@pytest.mark.usefixtures("space")
def test_inference_tensors_are_taken() -> None:
    found = tried()
    with torch.inference_mode():
        x, total, others = operands()
        assert found(x, total, others, "").is_inference()
        assert torch.equal(total, x / 2)


@pytest.mark.usefixtures("space")
def test_a_result_that_is_an_operand_is_refused() -> None:
    found = tried()
    with pytest.raises(KernelError, match="mixq::tried: a result shares memory"):
        found(*operands(), "returns x")


@pytest.mark.usefixtures("space")
def test_the_backward_pass_says_that_there_is_no_gradient() -> None:
    found = tried()
    x, total, others = operands()
    result = found(x.requires_grad_(), total, others, "")
    assert result.requires_grad, "a result cut off from x would train nothing, silently"
    with pytest.raises(MixqError, match="mixq::tried has no gradient"):
        result.sum().backward()


@pytest.mark.usefixtures("space")
def test_without_gradients_nothing_is_kept_for_them() -> None:
    found = tried()
    x, total, others = operands()
    with torch.no_grad():
        assert not found(x.requires_grad_(), total, others, "").requires_grad
    assert not found(x.detach(), total, others, "").requires_grad


@pytest.mark.usefixtures("space")
def test_a_graph_calls_it_and_writes_what_it_writes() -> None:
    found = tried()
    compiled = torch.compile(
        lambda x, total, others: found(x, total, others, "") + 1, backend="aot_eager", fullgraph=True
    )
    x, total, others = operands()
    with torch.no_grad():
        assert torch.equal(compiled(x, total, others), x / 2 + 1)
    assert torch.equal(total, x / 2)
    assert all(torch.equal(other, x / 2) for other in others)


def test_only_names_of_mixq_are_taken() -> None:
    with pytest.raises(MixqError, match="write mixq::name"):
        operator("other::tried", mutates_args=())
