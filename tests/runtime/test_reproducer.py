"""Folders that show by themselves how a pipeline breaks a program."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from compiling import block, rows
from linear_models import statistics
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import OptionError
from mixq_compile.ir.without_data import shapes_only
from mixq_compile.pipeline import Fuel, PassContext, Pipeline
from mixq_compile.pipeline.bisection import Rewrite, rewrites
from mixq_compile.pipeline.registry import default_registry
from mixq_compile.runtime.candidates import Candidate, Example, rewrite
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.plan import pipeline_for
from mixq_compile.runtime.reproducer import Finding, write_reproducer
from mixq_compile.runtime.weight_store import WeightStore

OWN_PASS = '''
from dataclasses import dataclass

import torch

from mixq_compile.pipeline import Decision, Pass
from {folder}names import NAME


@dataclass(frozen=True)
class DoubleBiases(Pass):
    """Wrong: adds every bias twice."""

    name = NAME

    def run(self, graph, context):
        for node in graph.walk(torch.ops.aten.linear.default):
            yield Decision.applied(node, "bias doubled")
            with graph.graph.inserting_after(node):
                readers = list(node.users)
                again = graph.call(torch.ops.aten.add.Tensor, (node, node.args[-1]), like=node)
            for reader in readers:
                reader.replace_input_with(node, again)
'''

Script = Callable[..., tuple[int, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a reproducer's script in this process; gives its exit code and what it wrote."""

    def run(folder: Path, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(folder / "reproduce.py"), run_name="__main__")
        code = end.value.code
        return (code, capsys.readouterr().out) if isinstance(code, int) else (1, str(code))

    return run


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Writes Python files and lets this process import them until `forget` is called."""
    root = tmp_path / "own"
    before = set(sys.modules)

    def write(**sources: str) -> Path:
        for place, source in sources.items():
            path = root / f"{place.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        monkeypatch.syspath_prepend(root)
        return root

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]
    default_registry.cache_clear()


def forget(root: Path) -> None:
    """Leaves this process as one that has never seen the modules below a folder."""
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    default_registry.cache_clear()


def example_of(model: nn.Module, x: Tensor) -> Example:
    return Example(mixq.capture(model, x), (x,), {})


def candidate_of(example: Example, pipeline: Pipeline, stats: object = None) -> Candidate:
    return rewrite(example.program, pipeline, PassContext(stats=stats, weights=WeightStore(), fuel=Fuel()))


def first_product(pipeline: Pipeline, candidate: Candidate) -> Rewrite:
    return next(one for one in rewrites(pipeline, candidate.history) if "mixed_gemm" in one.decision.reason)


@pytest.fixture
def example() -> Example:
    return example_of(block(), rows())


class TestOfARewrite:
    @pytest.fixture
    def found(self, example: Example) -> tuple[Pipeline, Rewrite]:
        pipeline = pipeline_for(MixqOptions(force=True, kernel="ref"), "aot")
        return pipeline, first_product(pipeline, candidate_of(example, pipeline))

    def test_shows_the_rewrite_and_what_it_costs(
        self, example: Example, found: tuple[Pipeline, Rewrite], tmp_path: Path, script: Script
    ) -> None:
        pipeline, product = found
        write_reproducer(tmp_path / "folder", example, pipeline, Finding("found it", product, sqnr=200))
        code, shown = script(tmp_path / "folder")
        assert code == 1
        assert f"rewrite {product.number}\n  pass: {product.index}, rewrite-mixed-linear" in shown
        assert "  layer: up_proj" in shown
        assert "+ mixed_gemm_default = torch.ops.mixq.mixed_gemm.default(" in shown
        assert f"with {product.number - 1} rewrites: good, SQNR inf dB" in shown
        assert f"with {product.number} rewrites: bad, SQNR" in shown

    def test_holds_all_that_it_needs(
        self, example: Example, found: tuple[Pipeline, Rewrite], tmp_path: Path
    ) -> None:
        pipeline, product = found
        write_reproducer(tmp_path, example, pipeline, Finding("found it\n\n", product, sqnr=200))
        names = {"program.pt2", "inputs.pt", "pipeline.txt", "culprit.txt", "reproduce.py"}
        assert {path.name for path in tmp_path.iterdir()} == names
        assert (tmp_path / "pipeline.txt").read_text() == f"{pipeline}\n"
        assert (tmp_path / "culprit.txt").read_text() == "found it\n"

    def test_other_limits_and_rewrites_may_be_asked_for(
        self, example: Example, found: tuple[Pipeline, Rewrite], tmp_path: Path, script: Script
    ) -> None:
        pipeline, product = found
        write_reproducer(tmp_path, example, pipeline, Finding("found it", product, sqnr=200))
        assert script(tmp_path, "--sqnr", 10)[0] == 0
        code, shown = script(tmp_path, "--fuel", 1)
        assert code == 0
        assert shown.startswith("rewrite 1\n")
        assert script(tmp_path, "--fuel", 1000)[1].startswith("there is no rewrite 1000")

    def test_says_where_another_rewrite_has_the_number(
        self, example: Example, found: tuple[Pipeline, Rewrite], tmp_path: Path, script: Script
    ) -> None:
        pipeline, product = found
        write_reproducer(tmp_path, example, pipeline, Finding("found it", product, sqnr=200))
        text = (tmp_path / "pipeline.txt").read_text()
        (tmp_path / "pipeline.txt").write_text(text.replace("force=true", "force=true ignore=up_proj"))
        assert "note: not the one that was found, which was rewrite-mixed-linear" in script(tmp_path)[1]

    def test_statistics_travel_along(self, tmp_path: Path, script: Script) -> None:
        example = example_of(block(), rows(columns=(3,), size=300.0))
        stats = statistics({"up_proj": {3: 300.0}})
        options = MixqOptions(force=True, kernel="ref", miss="static", stats=stats, ignore=("down_proj",))
        pipeline = pipeline_for(options, "aot")
        product = first_product(pipeline, candidate_of(example, pipeline, stats))
        write_reproducer(tmp_path, example, pipeline, Finding("found it", product, sqnr=30), stats)
        assert (tmp_path / "stats.safetensors").is_file()
        # Without its column in 16 bit, the large value would leave nothing of the others.
        assert script(tmp_path)[0] == 0

    def test_a_check_is_run_with_its_scripts(
        self, example: Example, found: tuple[Pipeline, Rewrite], tmp_path: Path, script: Script
    ) -> None:
        pipeline, product = found
        check = tmp_path / "my_check.py"
        check.write_text("import sys; sys.exit(b'mixed_gemm' in open(sys.argv[1], 'rb').read())")
        finding = Finding("found it", product, check=f"{sys.executable} {check} {{}}")
        write_reproducer(tmp_path / "folder", example, pipeline, finding)
        check.unlink()
        code, shown = script(tmp_path / "folder")
        assert code == 1
        assert f"with {product.number - 1} rewrites: good, exit code 0, SQNR inf dB" in shown
        assert f"with {product.number} rewrites: bad, exit code 1, SQNR" in shown


class TestOfAFailure:
    def test_shows_the_failure(
        self, example: Example, tmp_path: Path, script: Script, own_modules: Callable[..., Path]
    ) -> None:
        root = own_modules(own_doubling=OWN_PASS.format(folder="own_"), own_names="NAME = 'double-biases'")
        default_registry().add_module(importlib.import_module("own_doubling"))
        pipeline = Pipeline.parse("canonicalize-linear,double-biases")
        failure = candidate_of(example, pipeline).failure
        assert failure is not None
        write_reproducer(tmp_path / "folder", example, pipeline, Finding(str(failure)))
        forget(root)
        code, shown = script(tmp_path / "folder")
        assert code == 1
        assert shown.strip() == str(failure)

    def test_says_where_nothing_fails(self, example: Example, tmp_path: Path, script: Script) -> None:
        write_reproducer(tmp_path, example, Pipeline.parse("canonicalize-linear"), Finding("it failed"))
        assert script(tmp_path) == (0, "no pass fails here.\n")


class TestOwnPasses:
    @pytest.mark.parametrize(
        ("sources", "module", "copied"),
        [
            (
                {"own_doubling": OWN_PASS.format(folder="own_"), "own_names": "NAME = 'double-biases'"},
                "own_doubling",
                {"own_doubling.py", "own_names.py"},
            ),
            (
                {
                    "own_package__in____init__": "",
                    "own_package__in__doubling": OWN_PASS.format(folder="."),
                    "own_package__in__names": "NAME = 'double-biases'",
                    "own_package__in__unused": "",
                },
                "own_package.doubling",
                {"own_package/__init__.py", "own_package/doubling.py", "own_package/names.py"},
            ),
        ],
    )
    def test_sources_are_copied_with_what_they_import_from_beside_them(
        self,
        sources: dict[str, str],
        module: str,
        copied: set[str],
        tmp_path: Path,
        script: Script,
        own_modules: Callable[..., Path],
    ) -> None:
        root = own_modules(**sources)
        default_registry().add_module(importlib.import_module(module))
        example = example_of(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8)), rows())
        pipeline = Pipeline.parse("canonicalize-linear,double-biases")
        made = rewrites(pipeline, candidate_of(example, pipeline).history)
        write_reproducer(tmp_path / "folder", example, pipeline, Finding("found it", made[2], sqnr=40))
        forget(root)
        passes = tmp_path / "folder" / "passes"
        assert {str(path.relative_to(passes)) for path in passes.rglob("*.py")} == copied
        code, shown = script(tmp_path / "folder")
        assert code == 1
        assert "decision: bias doubled" in shown


def test_libraries_whose_classes_the_model_returns_are_imported(tmp_path: Path) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    class Model(nn.Module):
        def forward(self, x: Tensor) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=x + 1)

    write_reproducer(tmp_path, example_of(Model(), rows()), Pipeline(()), Finding("nothing"))
    assert "LIBRARIES = ['transformers.modeling_outputs']\n" in (tmp_path / "reproduce.py").read_text()


class TestRefusals:
    def test_a_folder_with_files_in_it(self, example: Example, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(OptionError, match="has files in it"):
            write_reproducer(tmp_path, example, Pipeline(()), Finding(""))
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_file(self, example: Example, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(OptionError, match="is a file"):
            write_reproducer(tmp_path / "notes.txt", example, Pipeline(()), Finding(""))

    def test_a_program_without_weights(self, tmp_path: Path) -> None:
        with shapes_only():
            model, x = nn.Linear(4, 4), torch.ones(2, 4)
            example = example_of(model, x)
        with pytest.raises(OptionError, match="captured without"):
            write_reproducer(tmp_path / "folder", example, Pipeline(()), Finding(""))
        assert not (tmp_path / "folder").exists()
