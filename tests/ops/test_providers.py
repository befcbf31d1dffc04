"""Provider registry: who is chosen, who is refused and why, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mixq_compile.errors import KernelError, OptionError
from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.ops import providers
from mixq_compile.ops.providers import KernelQuery, Provider

QUERY = KernelQuery("dequantize", torch.device("cpu"), torch.float32)


def nothing(x, accumulator, outlier_product, scale, weight_scale, bias):  # type: ignore[no-untyped-def]
    return x


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Provider]]:
    """The providers of `dequantize`, to be changed at will."""
    providers.load_providers()
    entries: dict[str, Provider] = {}
    monkeypatch.setattr(providers, "_PROVIDERS", {"dequantize": entries})
    providers.choose.cache_clear()
    yield entries
    providers.choose.cache_clear()


def entry(name: str, priority: int, verdict: bool | str = True) -> Provider:
    return Provider("dequantize", name, nothing, lambda query: verdict, priority)


def test_the_reference_implements_every_operator_and_supports_every_call() -> None:
    for op in providers.operators():
        found = {item.name: item for item in providers.providers_of(op)}
        assert "ref" in found, op
        written = TensorFormat(8, signed=op != "quantize_affine")
        query = KernelQuery(op, torch.device("cpu"), torch.float32, activation=written)
        assert found["ref"].supports(query) is True
        assert providers.providers_of(op)[-1].name == "ref", f"the reference is preferred for {op}"


def test_the_preferred_provider_that_supports_the_call_is_chosen(registry: dict[str, Provider]) -> None:
    registry["slow"] = entry("slow", 1)
    registry["fast"] = entry("fast", 5)
    registry["fastest"] = entry("fastest", 9, "needs a GPU")
    assert providers.choose(QUERY).name == "fast"
    assert providers.rejections(QUERY)[1] == {"fastest": "needs a GPU"}


def test_no_provider_is_an_error_with_all_reasons(registry: dict[str, Provider]) -> None:
    registry["one"] = entry("one", 1, "needs a GPU")
    registry["two"] = entry("two", 2, "needs AVX-512")
    with pytest.raises(KernelError, match=r"mixq::dequantize on cpu: two: needs AVX-512; one: needs a GPU"):
        providers.choose(QUERY)


def test_a_named_provider_is_found_or_the_valid_names_are_listed(registry: dict[str, Provider]) -> None:
    registry["slow"] = entry("slow", 1)
    assert providers.named("dequantize", "slow").name == "slow"
    with pytest.raises(
        OptionError, match=r"unknown kernel provider of mixq::dequantize 'slwo'.*'slow'.*Valid: slow"
    ):
        providers.named("dequantize", "slwo")


def test_a_provider_with_other_arguments_is_refused() -> None:
    with pytest.raises(KernelError, match="but the operator has"):

        @providers.provider("dequantize", name="wrong", priority=1, supports=lambda query: True)
        def wrong(x): ...  # type: ignore[no-untyped-def]


def test_a_provider_of_an_unknown_operator_is_refused() -> None:
    with pytest.raises(OptionError, match="unknown operator 'dequantise'"):
        providers.provider("dequantise", name="wrong", priority=1, supports=lambda query: True)(nothing)


def test_the_slow_reference_is_announced_once_for_each_operator_and_device(
    registry: dict[str, Provider], caplog: pytest.LogCaptureFixture
) -> None:
    registry["ref"] = entry("ref", 0)
    registry["fast"] = entry("fast", 5, "needs a GPU")
    providers.announced.clear()
    with caplog.at_level(logging.WARNING):
        for in_features in (64, 128, 256):
            providers.choose(
                KernelQuery("dequantize", torch.device("cpu"), torch.float32, INT8, INT8, in_features, 64)
            )
    assert [record.message for record in caplog.records] == [
        "mixq::dequantize on cpu runs the slow reference (fast: needs a GPU)"
    ]


def test_without_a_refusal_the_reference_is_not_announced(
    registry: dict[str, Provider], caplog: pytest.LogCaptureFixture
) -> None:
    registry["ref"] = entry("ref", 0)
    providers.announced.clear()
    with caplog.at_level(logging.WARNING):
        providers.choose(QUERY)
    assert not caplog.records


def test_the_switch_to_the_weight_only_kernel_is_the_providers(registry: dict[str, Provider]) -> None:
    registry["fast"] = Provider("dequantize", "fast", nothing, lambda query: True, 5, None, lambda query: 24)
    assert providers.small_batch_limit(QUERY) == 24
    registry["fast"] = entry("fast", 5)
    providers.choose.cache_clear()
    assert providers.small_batch_limit(QUERY) == 0


def test_a_provider_registered_after_a_call_is_chosen_by_the_next_one(registry: dict[str, Provider]) -> None:
    x, accumulator = torch.ones(2, 3), torch.ones(2, 4, dtype=torch.int32)
    arguments = x, accumulator, torch.ones(2, 4), torch.ones(2), torch.ones(4), None, "auto"
    made: list[str] = []

    def register(name: str, priority: int) -> None:
        @providers.provider("dequantize", name=name, priority=priority, supports=lambda query: True)
        def dequantize(
            x: Tensor, accumulator: Tensor, outlier_product: Tensor, scale: Tensor, weight_scale: Tensor,
            bias: Tensor | None,
        ) -> Tensor:  # fmt: skip
            made.append(name)
            return torch.empty(2, 4)

    for name, priority in (("first", 10_001), ("better", 10_002)):
        register(name, priority)
        torch.ops.mixq.dequantize.default(*arguments)
    assert made == ["first", "better"]
