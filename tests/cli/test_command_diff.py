import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import mixq, mixq_json

from mixq_compile import ops  # noqa: F401  # defines torch.ops.mixq
from mixq_compile.inspection.files import save_json
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.inspection.island import island
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline import PassContext, Pipeline
from mixq_compile.runtime.weight_store import WeightStore

WIDTH = 32
MODEL = f"{__name__}:stack"
FORCED = "canonicalize-linear,select-scheme{force=true},rewrite-mixed-linear"


def program(blocks: int = 2) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    for number in range(blocks):
        model.add_module(f"linear_{number}", torch.nn.Linear(WIDTH, WIDTH))
        model.add_module(f"relu_{number}", torch.nn.ReLU())
    return torch.export.export(model, (torch.randn(4, WIDTH),))


def stack() -> Any:
    """A model, no tokenizer, and an example: what `module:function` may return."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH))
    return model, None, (torch.randn(4, WIDTH),)


def inspection(pipeline: str, blocks: int = 2) -> Inspection:
    graph = CapturedGraph.from_export(program(blocks))
    history = Pipeline.parse(pipeline).run(graph, PassContext(weights=WeightStore()))
    return Inspection("stack", "x float32[4, 32]", (InspectedGraph.of(history),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inspections `a.json`, `b.json` (one more block) and `b.html`, and the programs of both."""
    made = tmp_path_factory.mktemp("diff")
    for name, blocks in (("a", 2), ("b", 3)):
        found = inspection(FORCED, blocks)
        save_json(found, made / f"{name}.json")
        (made / f"{name}.html").write_text(f"<html>{island({'inspection': found.to_json()})}</html>")
        torch.export.save(program(blocks), made / f"{name}.pt2")
    return made


def error(*arguments: object) -> str:
    """What a call with wrong input says on stderr, in one line."""
    return " ".join(mixq("diff", *arguments, code=2).output.replace("│", " ").split())


class TestFiles:
    def test_a_file_and_itself(self, folder: Path) -> None:
        shown = mixq("diff", folder / "a.json", folder / "a.json").stdout
        assert shown.startswith("no difference: ")
        assert shown.endswith(" nodes, 2 layers\n")

    def test_a_file_and_the_report_of_the_same(self, folder: Path) -> None:
        assert mixq("diff", folder / "a.json", folder / "a.html").stdout.startswith("no difference: ")

    def test_two_files(self, folder: Path) -> None:
        shown = mixq("diff", folder / "a.json", folder / "b.json").stdout
        assert "mixq.mixed_gemm.default 2 → 3 (+1)" in shown
        assert "layers: 1 differ (of 2 → 3)" in shown
        assert "@@ linear_2" in shown.splitlines(), "the nodes of the new layer are not shown"

    def test_lines_limits_the_patch(self, folder: Path) -> None:
        shown = mixq("diff", folder / "a.json", folder / "b.json", "--lines", 1).stdout
        assert shown.splitlines()[-2] == "@@ linear_2"
        assert "more lines: --lines" in shown.splitlines()[-1]

    def test_json_is_all_of_stdout(self, folder: Path) -> None:
        data = mixq_json("diff", folder / "a.json", folder / "b.json")
        assert data["differs"]
        assert [change["fqn"] for change in data["graphs"][0]["layers"]] == ["linear_2"]

    @pytest.mark.parametrize(("other", "code"), [("a.json", 0), ("b.json", 1)])
    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_fail_on_change_is_for_ci(self, folder: Path, other: str, code: int, form: list[str]) -> None:
        result = mixq("diff", folder / "a.json", folder / other, "--fail-on-change", *form, code=code)
        assert result.stdout, "the difference itself is to be shown as well"

    def test_without_it_a_difference_is_no_failure(self, folder: Path) -> None:
        mixq("diff", folder / "a.json", folder / "b.json", code=0)

    def test_fqn_limits_what_counts(self, folder: Path) -> None:
        files = (folder / "a.json", folder / "b.json")
        mixq("diff", *files, "--fqn", "linear_0", "--fail-on-change", code=0)
        mixq("diff", *files, "--fqn", "linear_2", "--fail-on-change", code=1)


class TestPrograms:
    def test_are_compared_as_they_are(self, folder: Path) -> None:
        data = mixq_json("diff", folder / "a.pt2", folder / "b.pt2")
        (graph,) = data["graphs"]
        assert graph["pipelines"] == ["", ""]
        assert graph["op_counts"] == {"aten.linear.default": [2, 3], "aten.relu.default": [2, 3]}

    def test_after_the_passes_that_are_given(self, folder: Path) -> None:
        arguments = ("diff", folder / "a.pt2", folder / "b.pt2", "--pipeline", FORCED)
        (graph,) = mixq_json(*arguments)["graphs"]
        assert graph["pipelines"] == [FORCED, FORCED]
        assert graph["op_counts"]["mixq.mixed_gemm.default"] == [2, 3]

    def test_one_program_beside_a_file_gets_the_passes(self, folder: Path) -> None:
        shown = mixq("diff", folder / "a.json", folder / "a.pt2", "--pipeline", FORCED).stdout
        assert shown.startswith("no difference: ")


class TestOneModel:
    def test_in_two_schemes(self) -> None:
        arguments = ("diff", MODEL, "--scheme", "w8a8o16", "--against-scheme", "w4a8o16", "--force")
        (graph,) = mixq_json(*arguments)["graphs"]
        schemes = [(layer["before"]["scheme"], layer["after"]["scheme"]) for layer in graph["layers"]]
        assert schemes == [("w8a8o16", "w4a8o16")] * 2
        assert not graph["nodes"]["added"]
        assert not graph["nodes"]["removed"]

    def test_in_two_pipelines(self) -> None:
        shown = mixq("diff", MODEL, "--pipeline", "canonicalize-linear", "--against", FORCED).stdout
        assert "aten.linear.default 2 → 0 (−2)" in shown

    def test_is_captured_once(self) -> None:
        arguments = ("diff", MODEL, "--pipeline", "strip-guards", "--against", "canonicalize-linear")
        assert mixq(*arguments).stderr.count("capturing") == 1

    def test_with_errors_shows_what_a_scheme_costs(self) -> None:
        arguments = ("diff", MODEL, "--against-scheme", "w4a8o16", "--force", "--errors")
        (graph,) = mixq_json(*arguments)["graphs"]
        assert all(layer["sqnr_change_db"] < -5 for layer in graph["layers"])


class TestWrongInput:
    """Every message says what is wrong, where and what to do; the exit code is 2."""

    def test_a_file_that_is_no_inspection(self, folder: Path, tmp_path: Path) -> None:
        for content in ('{"weights": 1}', "[]"):
            (tmp_path / "other.json").write_text(content)
            said = error(folder / "a.json", tmp_path / "other.json")
            assert "other.json: this is no inspection" in said
            assert "mixq inspect MODEL --json" in said

    @pytest.mark.parametrize(
        ("name", "content"), [("cut.json", '{"format"'), ("page.html", "<html></html>"), ("cut.html", "<ht")]
    )
    def test_a_file_that_was_cut_off(self, folder: Path, tmp_path: Path, name: str, content: str) -> None:
        (tmp_path / name).write_text(content)
        said = error(folder / "a.json", tmp_path / name)
        assert name in said
        assert "no inspection" in said or "no report" in said

    def test_a_file_of_another_version(self, folder: Path, tmp_path: Path) -> None:
        data = {**json.loads((folder / "a.json").read_text()), "schema": 99, "release": "7.0"}
        (tmp_path / "new.json").write_text(json.dumps(data))
        said = error(folder / "a.json", tmp_path / "new.json")
        assert "new.json: this inspection has schema version 99, written by mixq-compile 7.0" in said

    @pytest.mark.parametrize("name", ["absent.json", "absent.html", "absent.pt2", "/absent/model"])
    def test_a_file_that_is_missing(self, folder: Path, name: str) -> None:
        said = error(folder / "a.json", name)
        assert "absent" in said
        assert "does not exist" in said

    def test_a_file_is_missed_before_a_model_is_captured(self) -> None:
        said = error(MODEL, "absent.json")
        assert "does not exist" in said
        assert "capturing" not in said

    @pytest.mark.parametrize("option", ["--pipeline", "--against"])
    def test_an_unknown_pass(self, option: str) -> None:
        other = ("--against", "jit") if option == "--pipeline" else ()
        said = error(MODEL, option, "canonicalise-linear", *other)
        assert "Did you mean 'canonicalize-linear'" in said
        assert "capturing" not in said, "the model was captured before the options were looked at"

    def test_an_unknown_scheme(self) -> None:
        assert "Did you mean 'w8a8o16'" in error(MODEL, "--against-scheme", "w8a8o61")

    def test_an_unknown_option(self, folder: Path) -> None:
        assert "--agianst" in error(MODEL, "--agianst", "jit")

    def test_an_unknown_layer(self, folder: Path, tmp_path: Path) -> None:
        said = error(folder / "a.json", folder / "b.json", "--fqn", "lienar_1")
        assert "unknown layer 'lienar_1'. Did you mean 'linear_1'" in said

    @pytest.mark.parametrize("source", [MODEL, "FILE"])
    def test_nothing_to_compare_with(self, folder: Path, source: str) -> None:
        said = error(folder / "a.json" if source == "FILE" else source)
        assert "there is nothing to compare" in said
        assert "--against PIPELINE" in said

    @pytest.mark.parametrize("option", [("--against", "jit"), ("--against-scheme", "w8a8")])
    def test_both_b_and_a_second_way_to_compile(self, option: tuple[str, str]) -> None:
        assert f"{option[0]} compares two ways to compile A" in error(MODEL, MODEL, *option)

    def test_a_second_pipeline_over_a_file(self, folder: Path) -> None:
        said = error(folder / "a.json", "--against", "jit")
        assert "a.json is a saved inspection, over which no pipeline can run" in said

    @pytest.mark.parametrize("option", [["--scheme", "w8a8"], ["--force"], ["--batch", "2x8"]])
    def test_options_without_a_model(self, folder: Path, option: list[str]) -> None:
        said = error(folder / "a.json", folder / "b.json", *option)
        assert f"{option[0]} tells how to compile a model" in said

    def test_is_one_message(self, folder: Path) -> None:
        result = mixq("diff", folder / "a.json", "absent.json", code=2)
        assert result.stderr.startswith("error: absent.json does not exist.")
        assert result.stderr.count("\n") == 1
        assert not result.stdout
