"""`mixq inspect`, `layers` and `explain`, over a tiny Llama by configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import mixq, mixq_json

from mixq_compile.inspection.files import load_inspection
from mixq_compile.pipeline.registry import default_registry

FAILING_PASS = "fail-at-once"
MODEL = ("tiny_models:llama", "--batch", "2x8", "--force")


@pytest.fixture(autouse=True)
def only_installed_passes() -> Iterator[None]:
    """Passes that a test loads are forgotten behind it."""
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inspection on disk, which every command reads in place of a model."""
    path = tmp_path_factory.mktemp("inspected") / "llama.json"
    mixq("inspect", *MODEL, "--errors", "--json", path)
    return path


def test_inspect_shows_every_pass_and_the_captured_graph(saved: Path) -> None:
    shown = mixq("inspect", saved).stdout
    assert "as captured" in shown
    for name in ("strip-guards", "rewrite-mixed-linear", "verify"):
        assert name in shown
    assert "mixq.mixed_linear.default" in shown


def test_a_pass_is_shown_as_a_patch_by_name_or_number(saved: Path) -> None:
    by_name = mixq("inspect", saved, "--after", "rewrite-mixed-linear").stdout
    assert by_name == mixq("inspect", saved, "--after", "5").stdout
    assert "+ quantize_online_default" in by_name
    assert "- linear = torch.ops.aten.linear.default" in by_name


def test_a_patch_can_be_narrowed_to_a_layer(saved: Path) -> None:
    shown = mixq("inspect", saved, "--after", "rewrite-mixed-linear", "--fqn", "o_proj").stdout
    added = [line for line in shown.splitlines() if line.startswith("+ ")]
    assert added
    assert all("o_proj" in line or "getitem" in line or "default" in line for line in added)
    assert "q_proj_weight_codes =" not in shown


def test_changed_leaves_out_passes_that_changed_nothing(saved: Path) -> None:
    every, changed = (mixq("inspect", saved, "--after", which).stdout for which in ("all", "changed"))
    assert "# 13: verify" in every
    assert "# 13: verify" not in changed
    assert "# 5: rewrite-mixed-linear" in changed


def test_print_after_all_prints_programs_and_begins_with_state_0(saved: Path) -> None:
    shown = mixq("inspect", saved, "--print-after-all").stdout
    assert "# 0: as captured" in shown
    assert shown.count("def forward(self, input_ids, use_cache):") == 14
    assert "# 13: after verify" in shown


def test_the_pipelines_text_can_be_dumped_and_given_back() -> None:
    text = "strip-guards,canonicalize-linear,select-scheme{default=w8a8 force=true}"
    shown = mixq("inspect", "tiny_models:llama", "--batch", "2x8", "-p", text, "--dump-pipeline").stdout
    assert shown.strip() == text


def test_json_goes_to_stdout_alone(saved: Path) -> None:
    found = json.loads(mixq("inspect", saved, "--json", "-").stdout)
    assert found["format"] == "mixq-inspection"
    assert found["graphs"][0]["history"]["records"][0]["spec"] == "strip-guards"


def test_fuel_stops_the_rewrites() -> None:
    shown = mixq("inspect", *MODEL, "--fuel", 0).stdout
    assert "fuel spent" in shown
    assert "0 of 8 linears quantized" in shown


def test_a_report_is_a_page_that_commands_read(saved: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    mixq("inspect", saved, "--html", page)
    assert load_inspection(page) == load_inspection(saved)


def test_layers_shows_what_each_pass_touched_and_what_became_of_each(saved: Path) -> None:
    shown = mixq("layers", saved).stdout
    assert "model.layers.0.self_attn.q_proj" in shown
    assert "w8a8o16" in shown
    assert "left alone" in shown
    assert "M = 256" in shown
    assert "7 of 8 linears quantized" in shown


def test_layers_as_json_holds_errors_costs_and_touches(saved: Path) -> None:
    (graph,) = mixq_json("layers", saved)["graphs"]
    down = next(layer for layer in graph["layers"] if layer["fqn"].endswith("down_proj"))
    assert down["sqnr_db"] > 20
    assert down["found_columns"] is not None
    assert down["costs"]["256"]["operations"] == 2 * 256 * 32 * 64
    assert down["area"] > 1000
    assert down["passes"]["rewrite-mixed-linear"]["removed"] == 1


def test_explain_gives_every_decision_in_order_with_the_python_line(saved: Path) -> None:
    shown = mixq("explain", saved, "down_proj").stdout
    order = ["canonicalize-linear", "select-scheme", "rewrite-mixed-linear", "select-kernels", "computed by"]
    places = [shown.index(word) for word in order]
    assert places == sorted(places)
    assert "in forward: down_proj = self.down_proj(" in shown
    assert "mixed_linear" in shown


def test_explain_says_why_a_layer_was_left_alone(saved: Path) -> None:
    (found,) = mixq_json("explain", saved, "lm_head")
    assert found["layer"]["skip"] == "ignored: its name matches 'lm_head'"
    assert [step["decision"]["verdict"] for step in found["steps"]] == ["applied", "skipped"]


def test_a_model_of_any_size_is_inspected_without_its_weights() -> None:
    data = mixq_json("layers", "toy", "--batch", "1x8", "--force", "--figures", "h200")
    assert "without weights" in data["notes"][0]
    layers = data["graphs"][0]["layers"]
    assert sum(layer["scheme"] == "w8a8o16" for layer in layers) == 14
    assert all(layer["sqnr_db"] is None for layer in layers)
    areas = {layer["scheme"]: layer["area"] for layer in layers}
    assert areas["w8a8o16"] is None, "the number of outlier columns is not known, and is not guessed"
    assert areas[None] > 10_000


def test_weights_can_be_left_out_of_any_model() -> None:
    shown = mixq("layers", *MODEL, "--no-weights").stdout
    assert "7 of 8 linears quantized" in shown
    assert "≤16" in shown, "outlier columns that nobody counted are shown as a number"


def test_an_exported_program_is_inspected(tmp_path: Path) -> None:
    import torch
    from tiny_models import llama

    import mixq_compile

    model, _ = llama()
    program = mixq_compile.capture(
        model, {"input_ids": torch.ones(2, 8, dtype=torch.long), "use_cache": False}
    )
    torch.export.save(program, tmp_path / "model.pt2")
    data = mixq_json("layers", tmp_path / "model.pt2", "--force")
    assert "exported program" in data["notes"][0]
    assert len(data["graphs"][0]["layers"]) == 8


def test_a_pass_of_ones_own_can_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "own_passes.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from mixq_compile.pipeline import Decision, Pass\n\n"
        "@dataclass(frozen=True)\n"
        "class CountLinears(Pass):\n"
        '    """Counts."""\n\n'
        '    name: ClassVar[str] = "count-linears"\n\n'
        "    def run(self, graph, context):\n"
        "        for node in graph.walk():\n"
        "            if 'linear' in str(node.target):\n"
        "                yield Decision.noted(node, 'a linear')\n"
    )
    shown = mixq(
        "inspect",
        "tiny_models:llama",
        "--batch",
        "2x8",
        "--load",
        tmp_path / "own_passes.py",
        "-p",
        "count-linears",
    ).stdout
    assert "count-linears" in shown


def test_a_pass_that_fails_leaves_a_folder_that_shows_it(tmp_path: Path) -> None:
    folder = tmp_path / "failure"
    own = Path(__file__).with_name("broken_passes.py")
    arguments = ("inspect", *MODEL[:3], "--load", own, "-p", FAILING_PASS, "--reproducer", folder)
    shown = mixq(*arguments, code=1).output
    assert "failed" in shown
    assert str(folder / "reproduce.py") in "".join(shown.split("\n"))
    assert (folder / "program.pt2").is_file()
    assert FAILING_PASS in (folder / "pipeline.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "tiny_models:llama", "-p", "select-shceme"], "Did you mean 'select-scheme'"),
        (["inspect", "tiny_models:llama", "-p", "select-scheme{defualt=w8a8}"], "Did you mean 'default'"),
        (["inspect", "tiny_models:llama", "-p", "select-scheme{force=maybe}"], "takes true or false"),
        (
            ["inspect", "tiny_models:llama", "-p", "select-scheme,canonicalize-linear"],
            "requires 'canonical-linears'",
        ),
        (["inspect", "tiny_models:llama", "--batch", "8"], "sequences x tokens"),
        (["inspect", "tiny_models:llama", "--html", "/nowhere/report.html"], "does not exist"),
        (["inspect", "tiny_models:llama", "--load", "absent_module"], "No module named"),
        (["inspect", "tiny_models:llama", "--load", "tiny_models"], "defines no pass"),
        (["inspect", "absent.json"], "does not exist"),
        (["inspect", "absent.pt2"], "does not exist"),
        (["layers", "tiny_models:llama", "--figures", "fast"], "figures of a device"),
        (["explain", "tiny_models:llama", "donw_proj", "--batch", "2x8"], "unknown layer"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    shown = " ".join(mixq(*arguments, code=2).output.replace("│", " ").split())
    assert message in shown


def test_a_pass_that_is_not_in_the_run_is_a_usage_error(saved: Path) -> None:
    shown = mixq("inspect", saved, "--after", "rewrite-mixed-liner", code=2).output
    assert "Did you mean 'rewrite-mixed-linear'" in shown


def test_a_layer_that_does_not_exist_is_a_usage_error(saved: Path) -> None:
    shown = mixq("explain", saved, "model.layers.0.mlp.donw_proj", code=2).output
    assert "Did you mean 'model.layers.0.mlp.down_proj'" in shown


def test_a_model_without_linears_says_so() -> None:
    assert "function return (model, tokenizer, example)" in " ".join(
        mixq("layers", "tiny_models:convolution", code=1).output.split()
    )
