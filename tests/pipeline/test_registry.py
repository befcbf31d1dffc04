import importlib.metadata
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from throwaway_passes import AnnotateLinears, NegateTwice

from mixq_compile.errors import OptionError, PipelineError
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import (
    Decision,
    Pass,
    PassContext,
    PassRegistry,
    Pipeline,
    pass_names,
    pipeline_names,
)
from mixq_compile.pipeline.registry import build_registry, check_pass, default_registry, get_pass


def entry_point(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, "mixq_compile.passes")


class TestInstalledPasses:
    def test_every_one_can_be_loaded_and_is_named_after_its_module(self) -> None:
        for name in pass_names():
            kind = get_pass(name)
            assert kind.name == name
            assert kind.__module__.endswith("." + name.replace("-", "_"))

    def test_every_ones_default_spec_is_its_name(self) -> None:
        assert [get_pass(name)().spec() for name in pass_names()] == list(pass_names())

    def test_every_named_pipeline_can_be_built_and_round_trips(self) -> None:
        for name in pipeline_names():
            pipeline = Pipeline.named(name)
            assert pipeline.build() is pipeline
            assert Pipeline.parse(str(pipeline)) == pipeline

    def test_names_are_listed_without_importing_a_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith("mixq_compile.passes")]:
            monkeypatch.delitem(sys.modules, name)
        assert default_registry.__wrapped__().pass_names() == pass_names()
        assert not [name for name in sys.modules if name.startswith("mixq_compile.passes.")]

    def test_an_unknown_name_lists_the_valid_ones(self) -> None:
        with pytest.raises(OptionError, match="Did you mean 'negate-twice'"):
            PassRegistry.of(NegateTwice).get_pass("negate-twise")


class TestPlugins:
    def test_a_pass_of_another_package_is_found_by_its_entry_point(self) -> None:
        registry = build_registry([], [entry_point("negate-twice", "throwaway_passes:NegateTwice")])
        assert registry.get_pass("negate-twice") is NegateTwice

    def test_two_of_one_name_are_an_error_that_names_both(self) -> None:
        points = [entry_point("negate-twice", f"{package}:NegateTwice") for package in ("one", "other")]
        with pytest.raises(PipelineError, match="one in one:NegateTwice, one in other:NegateTwice"):
            build_registry([], points)

    def test_a_clash_with_a_pass_of_ours_is_an_error(self) -> None:
        with pytest.raises(PipelineError, match="two passes are named 'share-quantize'"):
            build_registry(["share_quantize"], [entry_point("share-quantize", "theirs:Share")])

    def test_what_is_no_pass_is_refused(self) -> None:
        registry = build_registry([], [entry_point("captures", "captures:TwoLayers")])
        with pytest.raises(PipelineError, match="must name a subclass of Pass"):
            registry.get_pass("captures")

    def test_helpers_are_no_passes(self) -> None:
        assert build_registry(["_helpers", "pipelines"], []).pass_names() == ()

    def test_a_pipeline_named_as_a_pass_is_an_error(self) -> None:
        registry = PassRegistry.of(NegateTwice, pipelines={"negate-twice": "negate-twice"})
        with pytest.raises(PipelineError, match="negate-twice: a pipeline and a pass have one name"):
            registry.pipelines()


class TestModules:
    @pytest.fixture
    def module(self, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
        module = types.ModuleType("mixq_compile.passes.some_pass")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    def test_a_module_without_a_pass_is_refused(self, module: types.ModuleType) -> None:
        with pytest.raises(PipelineError, match="some_pass must define exactly one pass; it defines none"):
            build_registry(["some_pass"], []).get_pass("some-pass")

    def test_imported_passes_do_not_count(self, module: types.ModuleType) -> None:
        module.NegateTwice = NegateTwice
        with pytest.raises(PipelineError, match="it defines none"):
            build_registry(["some_pass"], []).get_pass("some-pass")

    def test_a_pass_of_another_name_is_refused(self, module: types.ModuleType) -> None:
        module.Renamed = type("Renamed", (NegateTwice,), {"__module__": module.__name__})
        with pytest.raises(
            PipelineError, match="must be named 'some-pass', in kebab-case; it says 'negate-twice'"
        ):
            build_registry(["some_pass"], []).get_pass("some-pass")


class _Base(Pass):
    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        yield from ()


class NotDecorated(_Base):
    name: ClassVar[str] = "bad"


@dataclass(frozen=True)
class WithoutDefault(_Base):
    name: ClassVar[str] = "bad"
    limit: int


@dataclass(frozen=True)
class WithOddOption(_Base):
    name: ClassVar[str] = "bad"
    table: dict[str, int] | None = None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (NotDecorated, "must be decorated with @dataclass"),
        (WithoutDefault, "every option needs a default value; limit has none"),
        (WithOddOption, "an option is str, int, float, bool"),
        (_Base, "must be named 'bad', in kebab-case; it says None"),
    ],
)
def test_a_malformed_pass_is_refused(kind: type[Pass], expected: str) -> None:
    with pytest.raises(PipelineError) as caught:
        check_pass(kind, "bad", "tests")
    assert expected in str(caught.value)


def test_a_well_formed_pass_is_not() -> None:
    check_pass(AnnotateLinears, "annotate-linears", "tests")
