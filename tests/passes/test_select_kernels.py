"""`select-kernels`: the provider of each operator, and why others were refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from captures import ROUTES
from linear_models import Attention, captured
from rewriting import FUSED, decisions, run

from mixq_compile.errors import KernelError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops import providers
from mixq_compile.ops.operands import operand
from mixq_compile.ops.providers import KernelQuery, Provider
from mixq_compile.ops.traits import traits_of
from mixq_compile.passes.select_kernels import SelectKernels
from mixq_compile.pipeline import PassContext, PassError


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Provider]]:
    """All providers of mixed_linear: the reference, and a preferred one to be changed at will."""
    providers.load_providers()
    entries = {"ref": providers._PROVIDERS["mixed_linear"]["ref"], "fast": provider(True)}
    monkeypatch.setitem(providers._PROVIDERS, "mixed_linear", entries)
    providers.choose.cache_clear()
    yield entries
    providers.choose.cache_clear()


def provider(verdict: bool | str, asked: list[KernelQuery] | None = None) -> Provider:
    def supports(query: KernelQuery) -> bool | str:
        if asked is not None:
            asked.append(query)
        return verdict

    return Provider("mixed_linear", "fast", lambda: None, supports, 9)


def kernels(graph: CapturedGraph) -> dict[str, set[str]]:
    """The providers that the nodes name, by operator."""
    found: dict[str, set[str]] = {}
    for node in graph.graph.nodes:
        traits = traits_of(node.target)
        if traits is not None:
            found.setdefault(traits.name, set()).add(operand(node, "kernel"))
            assert Annotations(node).kernel == operand(node, "kernel")
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_each_operator_gets_a_name(route: str) -> None:
    graph = captured(Attention(), route)
    history = run(graph, f"{FUSED},select-kernels{{kernel=ref}}")
    assert kernels(graph) == {
        name: {"ref"} for name in ("quantize_online", "refresh_outlier_weights", "mixed_linear")
    }
    assert [d.verdict for d in decisions(history, "select-kernels")] == ["applied"] * 8


def test_the_preferred_one_that_supports_the_call_is_taken(fast: dict[str, Provider]) -> None:
    graph = captured(Attention(), "dynamo")
    run(graph, f"{FUSED},select-kernels")
    assert kernels(graph)["mixed_linear"] == {"fast"}


def test_refusals_are_in_the_decision(fast: dict[str, Provider]) -> None:
    fast["fast"] = provider("needs a GPU")
    graph = captured(Attention(), "dynamo")
    history = run(graph, f"{FUSED},select-kernels")
    assert kernels(graph)["mixed_linear"] == {"ref"}
    details = [d.details for d in decisions(history, "select-kernels") if "mixed_linear" in d.reason]
    assert details[0] == {"refused": {"fast": "needs a GPU"}}


def test_the_provider_is_told_device_dtype_and_bits(fast: dict[str, Provider]) -> None:
    asked: list[KernelQuery] = []
    fast["fast"] = provider(True, asked)
    graph = captured(Attention(), "dynamo")
    run(graph, FUSED.replace("force=true", "force=true default=w4a8o16") + ",select-kernels")
    final = asked[-1]
    assert (final.op, final.device, final.dtype, final.weight.bits) == (
        "mixed_linear", torch.device("cpu"), torch.float32, 4,
    )  # fmt: skip


def test_a_named_provider_serves_what_it_implements(fast: dict[str, Provider]) -> None:
    graph = captured(Attention(), "dynamo")
    history = run(graph, f"{FUSED},select-kernels{{kernel=fast}}")
    found = kernels(graph)
    assert found["mixed_linear"] == {"fast"}
    assert "fast" not in found["quantize_online"]
    details = [d.details for d in decisions(history, "select-kernels") if "quantize_online" in d.reason]
    assert details[0]["refused"]["fast"] == "does not implement this operator"


def test_a_named_provider_that_refuses_is_an_error(fast: dict[str, Provider]) -> None:
    fast["fast"] = provider("needs a GPU")
    graph = captured(Attention(), "dynamo")
    with pytest.raises(
        PassError, match="kernel 'fast' cannot run mixq::mixed_linear on cpu: needs a GPU"
    ) as caught:
        run(graph, f"{FUSED},select-kernels{{kernel=fast}}")
    assert isinstance(caught.value.__cause__, KernelError)


def test_other_operators_are_left_alone() -> None:
    graph = captured(Attention(), "dynamo")
    assert decisions(run(graph, f"{FUSED},select-kernels"), "select-kernels")
    plain = captured(Attention(), "dynamo")
    assert not list(SelectKernels().run(plain, PassContext()))
