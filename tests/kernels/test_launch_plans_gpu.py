"""Launch plans on a GPU: the same bits as without them, whatever happens to memory, threads and streams."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mixq_compile
from mixq_compile.errors import MixqError, OperandError
from mixq_compile.formats import INT8
from mixq_compile.kernels.tl import plan_library
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.ops.providers import load_providers
from mixq_compile.ops.weight_codes import quantize_weight
from mixq_compile.scheme import WeightRecipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CUDA = torch.device("cuda")
COLUMNS, FEATURES, SLOTS = 512, 1024, 64


@pytest.fixture(autouse=True)
def plans() -> Iterator[None]:
    load_providers()
    assert plan_library.enabled(), "plans do not implement the operators here"
    plan_library.forget_plans()
    with torch.no_grad():
        yield


class Linear(NamedTuple):
    """A linear and its outlier state on a device, random but the same in every call."""

    state: OutlierState
    codes: Tensor
    scale: Tensor
    original: Tensor
    cached_index: Tensor
    outlier_weight: Tensor

    @classmethod
    def make(cls, device: torch.device = CUDA, features: int = FEATURES) -> Linear:
        generator = torch.Generator(device).manual_seed(3)
        weight = torch.randn(features, COLUMNS, device=device, dtype=torch.bfloat16, generator=generator)
        return cls(
            OutlierState.create(COLUMNS, SLOTS, 6.0, device),
            *quantize_weight(weight, WeightRecipe(INT8)), weight,
            torch.full((SLOTS,), -1, dtype=torch.int32, device=device),
            torch.zeros(features, SLOTS, dtype=torch.bfloat16, device=device),
        )  # fmt: skip

    def run(self, x: Tensor, miss: str = "exact") -> tuple[Tensor, ...]:
        """Codes, scale, outliers, count and product, by the three operators."""
        mixq = torch.ops.mixq
        quantized = mixq.quantize_online.default(x, *self.state.buffers(), "int8", miss, 0, "auto")
        codes, scale, outliers, count = quantized
        mixq.refresh_outlier_weights.default(
            codes, self.state.index, count, [self.cached_index], [self.outlier_weight], [self.codes],
            [self.scale], [self.original], 0, "auto",
        )  # fmt: skip
        product = mixq.mixed_linear.default(
            x, codes, scale, outliers, count, self.codes, self.scale, self.outlier_weight, None, 0, "auto"
        )
        return *quantized, product


def activation(rows: int, seed: int, device: torch.device = CUDA) -> Tensor:
    """A value with an outlier column that depends on the seed."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, COLUMNS, device=device, dtype=torch.bfloat16, generator=generator)
    x[:, 5 + 7 * seed % 400] *= 20
    return x


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """All but the outlier slots beyond the count, which nothing reads."""
    used = int(expected[3])
    return all(
        torch.equal(left[..., :used], right[..., :used]) if place == 2 else torch.equal(left, right)
        for place, (left, right) in enumerate(zip(found, expected, strict=True))
    )


def without_plans(rows: int, seeds: range, features: int = FEATURES) -> list[tuple[Tensor, ...]]:
    """The results of calls that each meet an empty cache of plans, and so run in Python."""
    linear, results = Linear.make(features=features), []
    for seed in seeds:
        plan_library.forget_plans()
        results.append(linear.run(activation(rows, seed)))
    plan_library.forget_plans()
    return results


@pytest.mark.parametrize("rows", [1, 17, 300, 4000])
def test_planned_calls_give_the_bits_of_calls_in_python(rows: int) -> None:
    seeds = range(6)
    expected = without_plans(rows, seeds)
    linear = Linear.make()
    found = [linear.run(activation(rows, seed)) for seed in seeds]
    assert plan_library.plans_of("mixq::quantize_online") == 1
    assert plan_library.plans_of("mixq::refresh_outlier_weights") == 1
    assert plan_library.plans_of("mixq::mixed_linear") == 1
    assert all(map(equal, found, expected))


def test_tiles_that_programs_share_take_the_flags_of_their_stream() -> None:
    seeds, rows, features = range(5), 3000, 11008
    expected = without_plans(rows, seeds, features)
    linear, other = Linear.make(features=features), torch.cuda.Stream()
    for seed in seeds:
        stream = other if seed % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = linear.run(activation(rows, seed))
        torch.cuda.synchronize()
        assert equal(found, expected[seed])


def test_memory_that_was_freed_and_given_out_again() -> None:
    seeds = range(8)
    expected = without_plans(64, seeds)
    linear, kept = Linear.make(), []
    for seed in seeds:
        kept.append(torch.empty(1000 + 77777 * seed, device=CUDA))  # so that addresses move
        x = activation(64, seed)
        found = linear.run(x)
        assert equal(found, expected[seed]), f"call {seed}"
        del x, found
        if seed % 2:
            kept.clear()
            torch.cuda.empty_cache()


def swapped() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, FEATURES, device=CUDA, dtype=torch.bfloat16))
    mixq_compile.quantize(model)
    return model


def test_a_module_loaded_moved_and_copied_computes_with_the_weights_that_it_has_now() -> None:
    model, x = swapped(), activation(64, 1)
    for _ in range(3):
        first = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), first)
    with torch.no_grad():
        twin[0].weight_scale.mul_(2)
    assert not torch.equal(twin(x), first)
    assert torch.equal(model(x), first), "a copy's write reached the model it was copied from"
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(x), twin(x))
    model = model.to("cpu").to(CUDA)
    assert torch.equal(model(x), twin(x))


def test_two_threads_on_two_streams_get_what_one_gets() -> None:
    model, rows = swapped(), 96
    xs = [activation(rows, 0) for _ in range(2)]
    for _ in range(3):
        expected = model(xs[0])
    torch.cuda.synchronize()
    problems: list[str] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(40):
                    if not torch.equal(model(xs[number]), expected):
                        problems.append(f"thread {number} got another result")
        except Exception as error:
            problems.append(f"thread {number}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_a_thread_that_has_not_used_the_gpu_yet_launches_a_plan() -> None:
    linear, x = Linear.make(), activation(64, 0)
    for _ in range(4):
        expected = linear.run(x)
    torch.cuda.synchronize()
    found: list[Any] = []

    def work() -> None:
        try:
            with torch.no_grad():
                found.append(linear.run(x))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not isinstance(found[0], Exception), found[0]
    assert equal(found[0], expected)


def test_two_streams_under_frozen() -> None:
    linear = Linear.make()
    linear.run(activation(64, 2))
    linear.state.freeze()
    torch.cuda.synchronize()
    x = activation(64, 2)
    for _ in range(3):
        expected = linear.run(x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found = linear.run(x)
            stream.synchronize()
            assert equal(found, expected)


def test_a_captured_call_is_replayed_with_what_its_memory_holds_then() -> None:
    seeds = range(5)
    expected = without_plans(300, seeds)
    linear, x = Linear.make(), activation(300, 0)
    for _ in range(3):
        linear.run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = linear.run(x)
    for seed in seeds:
        x.copy_(activation(300, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert equal(found, expected[seed]), f"replay {seed}"


def test_changing_numbers_of_rows_keep_the_memory_bounded() -> None:
    linear, most = Linear.make(), plan_library.PLANS_OF_AN_OPERATOR
    index, column_slot, counters = linear.state.index, linear.state.column_slot, linear.state.counters
    for rows in range(1, most + 40):
        torch.ops.mixq.quantize.default(activation(rows, 0), index, column_slot, counters, "int8", 0, "auto")
    assert plan_library.keys_of("mixq::quantize") == most


def test_operands_that_do_not_fit_are_refused_after_calls_that_did() -> None:
    linear, x = Linear.make(), activation(64, 0)
    for _ in range(4):
        linear.run(x)
    with pytest.raises(OperandError, match="column_slot"):
        linear.run(x[:, :-16].contiguous())
    with pytest.raises(OperandError, match="dtype"):
        linear.run(x.to(torch.int8))
    with pytest.raises(OperandError, match="is on cpu"):
        linear._replace(scale=linear.scale.cpu()).run(x)


def test_writes_are_counted_and_results_are_ordinary_tensors() -> None:
    linear, x = Linear.make(), activation(64, 0)
    for _ in range(3):
        linear.run(x)
    before = linear.state.index._version, linear.outlier_weight._version
    result = linear.run(x)[-1]
    after = linear.state.index._version, linear.outlier_weight._version
    assert all(later > earlier for later, earlier in zip(after, before, strict=True))
    assert not result.is_inference()
    assert not result.requires_grad
    with torch.inference_mode():
        assert linear.run(x)[-1].is_inference()


def test_a_planned_call_has_no_gradient_and_says_so() -> None:
    linear, x = Linear.make(), activation(64, 0)
    for _ in range(4):
        linear.run(x)
    with torch.enable_grad():
        x.requires_grad_()
        product = linear.run(x)[-1]
        with pytest.raises(MixqError, match="mixed_linear has no gradient"):
            product.sum().backward()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_plan_is_of_one_device() -> None:
    results: list[Any] = []
    for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
        linear = Linear.make(device)
        results.append(
            [tuple(t.cpu() for t in linear.run(activation(64, seed, device))) for seed in range(4)]
        )
    assert plan_library.plans_of("mixq::mixed_linear") == 2
    assert all(map(equal, *results))
