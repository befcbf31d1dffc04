"""`mixq area`: a model's linears by scheme, the comparison with published figures, and files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from commands import mixq, mixq_json

MODEL = ("tiny_models:llama", "--batch", "2x8")


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("area")
    mixq("area", *MODEL, "--output", folder)
    return folder


def test_every_scheme_and_linear_is_shown_with_its_error(written: Path) -> None:
    data = json.loads((written / "area.json").read_text())
    assert len(data["layers"]) == 7
    assert len(data["layers"][0]["schemes"]) == 16
    assert set(data["layers"][0]["sqnr_db"]) == set(data["layers"][0]["schemes"])
    totals = {total["scheme"]: total for total in data["totals"]}
    assert totals["w8a8o16"]["sqnr_db"] > totals["w4a4o16"]["sqnr_db"] + 10
    assert (
        totals["lqer_int8"]["sqnr_db"] > totals["lqer_mxint4"]["sqnr_db"] > totals["lqer_mxint2"]["sqnr_db"]
    )
    assert any(total["on_pareto_front"] for total in totals.values())
    assert "lm_head" in " ".join(data["notes"])


def test_markdown_and_a_plot_are_written(written: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (written / "area.png").read_bytes().startswith(b"\x89PNG")
    text = (written / "area.md").read_text()
    assert "| scheme | area | cycles |" in text
    assert "model.layers.0.mlp.down_proj" in text


def test_without_matplotlib_the_plot_is_left_out_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> object:
        return None if name == "matplotlib" else found(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without)
    result = mixq("area", *MODEL, "--scheme", "fp16,w8a8", "--output", tmp_path)
    assert "matplotlib is not installed" in plain(result.stderr)
    assert not (tmp_path / "area.png").exists()


def test_a_table_has_totals_and_collapses_alike_linears() -> None:
    shown = plain(mixq("area", "toy", "--scheme", "fp16,awq,lqer_mxint4", "--folding", "rate-matched").stdout)
    assert "all linears" in shown
    assert "×2" in shown
    assert "NAND2 equivalents, 16 lanes, folding rate-matched, 1 row" in shown


def test_without_weights_outlier_columns_must_be_given() -> None:
    refused = plain(mixq("area", "toy", "--scheme", "w8a8o16", code=2).output)
    assert "give --columns N, or --stats of a calibration" in refused
    data = mixq_json("area", "toy", "--scheme", "w8a8o16", "--columns", "5")
    assert {layer["outlier_columns"] for layer in data["layers"]} == {5}


def test_all_schemes_without_weights_are_those_that_need_no_count() -> None:
    data = mixq_json("area", "toy")
    assert {"llm_int8", "w8a8o16"}.isdisjoint(data["layers"][0]["schemes"])
    assert any("number of outlier columns is not known" in note for note in data["notes"])


def test_outlier_columns_are_those_that_the_run_found() -> None:
    data = mixq_json("area", *MODEL, "--scheme", "w8a8o16", "--threshold", "0.5")
    found = [layer["outlier_columns"] for layer in data["layers"]]
    assert max(found) > 0
    assert all(
        layer["schemes"]["w8a8o16"]["settings"]["num_high_precision_cols"] == layer["outlier_columns"]
        for layer in data["layers"]
    )


def test_errors_can_be_left_out() -> None:
    data = mixq_json("area", *MODEL, "--scheme", "w8a8o16,w8a8", "--no-errors")
    assert all(not layer["sqnr_db"] for layer in data["layers"])
    assert all(layer["outlier_columns"] is not None for layer in data["layers"])


def test_a_saved_inspection_is_read(tmp_path: Path) -> None:
    saved = tmp_path / "model.json"
    mixq("inspect", *MODEL, "--force", "--errors", "--json", saved)
    data = mixq_json("area", saved, "--scheme", "fp16,w8a8o16")
    assert all(layer["sqnr_db"]["w8a8o16"] > 20 for layer in data["layers"])
    assert all(layer["outlier_columns"] is not None for layer in data["layers"])


def test_options_reach_the_circuit() -> None:
    arguments = ("area", "toy", "--scheme", "fp16,lqer_int4")
    data = mixq_json(*arguments, "--lanes", 8, "--technology", "lut6", "--rows", 3, "--rank", 4)
    assert data["assumptions"]["lanes_k"] == 8
    assert data["assumptions"]["technology"] == "lut6"
    report = data["layers"][0]["schemes"]["lqer_int4"]
    assert report["settings"] == {"rank": 4}
    assert report["shape"][0] == 3


def test_linears_that_are_narrower_than_the_lanes_are_left_out() -> None:
    shown = mixq_json("area", *MODEL, "--scheme", "fp16", "--lanes", 48)
    assert [layer["fqn"].rpartition(".")[2] for layer in shown["layers"]] == ["down_proj"]
    assert any("fewer input features than lanes" in note for note in shown["notes"])


def test_the_comparison_stands_beside_published_figures_and_names_orders() -> None:
    shown = plain(mixq("area", "--compare").stdout)
    for wanted in ("21.23", "13.99", "never a target", "FP16 < AWQ", "orders that survive"):
        assert wanted in shown
    data = mixq_json("area", "--compare")
    assert data["relative"]["nand2, none"]["fp16"] == 1
    assert all(all(held.values()) for held in data["orders"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give MODEL, or --compare, or --validate"),
        (("toy", "--scheme", "w8a8o61"), "Did you mean"),
        (("toy", "--scheme", ","), "no scheme was given"),
        (("toy", "--technology", "nand"), "Did you mean 'nand2'"),
        (("toy", "--folding", "rate"), "unknown folding 'rate'"),
        (("toy", "--lanes", "0"), "greater than or equal to 1"),
        (("toy", "--quick"), "--quick belongs to --validate"),
        (("toy", "--scheme", "w8a8o16", "--columns", "100000"), "outlier_columns must be 0 to"),
        (("absent.json",), "does not exist"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    assert message in plain(mixq("area", *arguments, code=2).output)


def test_validation_without_the_cell_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixq_compile.area import synthesis

    monkeypatch.setenv("MIXQ_LIBERTY", "/nowhere/cells.lib")
    synthesis._surroundings.cache_clear()
    message = plain(mixq("area", "--validate", "--quick", code=1).output)
    synthesis._surroundings.cache_clear()
    assert "apt-get install" in message


@pytest.mark.parametrize(("predicted", "code"), [(101.0, 0), (200.0, 1)])
def test_validation_shows_errors_and_fails_where_one_is_beyond_its_bound(
    predicted: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixq_compile.area import validation

    row = validation.Row("dot", "fixed_dot", {"lanes": 16}, "nand2", predicted, 100.0, used_to_fit=False)
    monkeypatch.setattr(validation, "validate", lambda quick: [row])
    shown = mixq("area", "--validate", code=code).stdout
    assert "fixed_dot(lanes 16)" in shown
    (found,) = mixq_json("area", "--validate", code=code)
    assert found["holds"] == (code == 0)
