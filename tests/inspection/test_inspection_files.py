import json
from pathlib import Path

import pytest
from inspected_models import llama_inspection

from mixq_compile.errors import OptionError
from mixq_compile.inspection.files import is_inspection_file, load_inspection, save_json
from mixq_compile.inspection.inspection import Inspection
from mixq_compile.inspection.island import island, read_island


def test_json_gives_the_inspection_back(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    save_json(llama_inspection(), path)
    assert load_inspection(path) == llama_inspection()


def test_a_page_gives_it_back_too(tmp_path: Path) -> None:
    path = tmp_path / "model.html"
    data = island({"inspection": llama_inspection().to_json()})
    path.write_text(f"<!doctype html><title>x</title>{data}<p>more</p>")
    assert load_inspection(path) == llama_inspection()


def test_the_same_data_gives_the_same_page() -> None:
    assert island({"a": [1, "</script>"]}) == island({"a": [1, "</script>"]})
    assert read_island(island({"a": [1, "</script>"]})) == {"a": [1, "</script>"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json at all", "neither JSON"),
        ('{"answer": 42}', "no inspection"),
        ("[1, 2]", "no inspection"),
        ("<html><body>a page</body></html>", "holds no data of mixq"),
        ('<script id="mixq-data" type="x">AAAA</script>', "cannot be read"),
        (json.dumps({"format": "mixq-inspection", "schema": 99, "release": "9.0"}), "written by .* 9.0"),
        (json.dumps({"format": "mixq-inspection", "schema": 1}), "no whole inspection"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=message) as caught:
        load_inspection(path)
    assert str(path) in str(caught.value), "the error does not say which file"


def test_a_missing_file_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"does not exist.*mixq inspect"):
        load_inspection(tmp_path / "absent.json")


def test_files_are_told_from_models_by_their_ending(tmp_path: Path) -> None:
    assert is_inspection_file(Path("report.html"))
    assert is_inspection_file(Path("model.JSON"))
    assert not is_inspection_file(Path("stories260k"))
    (tmp_path / "folder.json").mkdir()
    assert not is_inspection_file(tmp_path / "folder.json")


def test_an_inspection_finds_a_layer_by_its_name() -> None:
    graph = llama_inspection().graphs[0]
    assert graph.layer("lm_head") is graph.layers[-1]
    assert graph.layer("absent") is None
    assert Inspection.from_json(llama_inspection().to_json()) == llama_inspection()
