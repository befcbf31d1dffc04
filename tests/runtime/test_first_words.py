"""What a user reads first when something is printed or fails: short, in words, and without a wrapper."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from compiling import FEATURES, compiled, rows
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import MixqError, OptionError, StatisticsError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import Decision, Pass, PassContext, PassError, Pipeline


def deep(count: int = 40) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, FEATURES) for _ in range(count)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def test_statistics_print_in_one_line():
    stats = mixq.calibrate(deep(), [rows()])
    kind = "torch.nn.modules.container.Sequential"
    assert repr(stats) == f"<CalibrationStats of 40 linears of {kind} (float32): 6 rows, channels>"
    assert "tensor" not in repr(mixq.MixqOptions(stats=stats))


WRONG = {
    "scheme": ({"scheme": "w8a9"}, OptionError, "Did you mean 'w8a8'"),
    "name": ({"bogus": 1}, OptionError, "unknown option 'bogus'"),
    "value": ({"threshold": -1}, OptionError, "threshold must be above 0"),
    "pipeline": ({"pipeline": "nope"}, MixqError, "unknown pass 'nope'"),
    "layers": ({"layers": {"0": "w8a9"}}, OptionError, "Did you mean 'w8a8'"),
    "file": ({"stats": "missing.safetensors"}, StatisticsError, "cannot read statistics"),
}


@pytest.mark.parametrize(("options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_option_raises_its_own_error_at_the_first_call(options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        torch.compile(deep(1), backend="mixq", options=options)(rows())
    assert isinstance(caught.value, MixqError)
    assert type(caught.value).__name__ == kind.__name__ or kind is MixqError


@dataclass(frozen=True)
class UsesTooEarly(Pass):
    """A broken pass: it puts a reader before what it reads."""

    name: ClassVar[str] = "uses-too-early"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        last = next(node for node in reversed(graph.graph.nodes) if node.op == "call_function")
        yield Decision.applied(last, "moved")
        next(node for node in graph.graph.nodes if node.op == "call_function").prepend(last)


@dataclass(frozen=True)
class SaysTooMuch(Pass):
    """A broken pass whose error holds the whole graph."""

    name: ClassVar[str] = "says-too-much"

    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        yield Decision(node="", fqn="", verdict="noted", reason="nothing yet")
        raise ValueError("\n".join(f"line {number} of the graph" for number in range(400)))


@pytest.mark.parametrize("broken", [UsesTooEarly(), SaysTooMuch()], ids=lambda step: step.name)
def test_the_error_of_a_broken_pass_fits_on_a_screen(broken):
    program = mixq.capture(deep(), (rows(),))
    with pytest.raises(PassError) as caught:
        Pipeline((broken,)).run(CapturedGraph.from_export(program))
    assert len(str(caught.value).splitlines()) <= 16
    assert max(map(len, str(caught.value).splitlines())) < 600


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


class Inside(nn.Module):
    """A model around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


def swapped() -> nn.Module:
    torch.manual_seed(0)
    return mixq.quantize(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 8)))


def told(model: nn.Module) -> dict[str, str | None]:
    return {linear.fqn: linear.skip for linear in mixq.report(model).linears}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_the_report_of_a_copy_says_what_that_of_the_model_says(copied):
    model = swapped()
    assert told(model)["1"] is not None
    assert told(copied(model)) == told(model)


def test_the_report_of_a_model_around_a_swapped_one_names_all_linears_of_it():
    model = swapped()
    assert told(Inside(model)) == {f"inner.{name}": why for name, why in told(model).items()}


def test_a_compiled_model_that_only_generated_is_told_so():
    class Generating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

        def generate(self, x: Tensor) -> Tensor:
            return self(x)

    fast = compiled(Generating())
    fast.generate(rows())
    with pytest.warns(UserWarning, match="runs without mixq.*prepare_for_generation"):
        mixq.report(fast)


class Features(nn.Module):
    """A model that takes all features in one mapping, as those of sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, input: dict[str, Tensor], **others: object) -> Tensor:
        return self.linear(input["x"])


def test_features_in_one_mapping_are_calibrated_and_captured():
    model = Features().eval()
    stats = mixq.calibrate(model, [{"x": rows()}])
    assert stats.total_rows == 6
    assert mixq.capture(model, {"x": rows()}).module()({"x": rows()}).shape == (6, FEATURES)


def test_a_batch_that_the_model_cannot_take_is_told_in_words():
    with pytest.raises(OptionError, match="takes no argument 'x': it has input"):
        mixq.calibrate(deep(1), [{"x": rows()}])
    with pytest.raises(OptionError, match="takes no argument 'x': it has input"):
        mixq.capture(deep(1), {"x": rows()})
