from commands import mixq, mixq_json

from mixq_compile.pipeline import Pipeline, pass_names, pipeline_names


def test_passes() -> None:
    found = {entry["name"]: entry for entry in mixq_json("passes")}
    assert set(found) == set(pass_names())
    assert all(entry["summary"].endswith((".", ";")) or entry["summary"] for entry in found.values())
    options = {option["name"]: option for option in found["select-scheme"]["options"]}
    assert options["default"]["default"] == "w8a8o16"
    assert options["default"]["doc"]
    assert options["force"]["type"] == "true or false"


def test_passes_as_text() -> None:
    shown = mixq("passes", "select-scheme").stdout
    assert shown.startswith("select-scheme")
    assert "default=w8a8o16" in shown
    assert "canonicalize-linear" not in shown


def test_pipelines() -> None:
    found = {entry["name"]: entry for entry in mixq_json("pipelines")}
    assert set(found) == set(pipeline_names())
    for entry in found.values():
        assert str(Pipeline.parse(entry["text"])) == entry["text"]
        assert ",".join(entry["passes"]) == entry["text"]


def test_pipelines_as_text() -> None:
    shown = mixq("pipelines", "jit").stdout
    assert shown.startswith("jit")
    assert str(Pipeline.named("jit")) in shown
