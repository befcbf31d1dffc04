"""`mixq generate`: the text of the model's own `generate`, as it comes, with its speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import mixq, mixq_json

pytest.importorskip("transformers")
MODEL, PROMPT = "tiny_models:llama", "a story"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "quantized"
    mixq("quantize", MODEL, "--output", path)
    return path


def test_a_quantized_directory_goes_on_with_a_text(folder: Path) -> None:
    import transformers

    found = mixq_json("generate", folder, "--prompt", PROMPT, "--new", "6")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found["text"] == tokenizer.decode(
        made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert found["prompt_tokens"] == inputs["input_ids"].shape[1] == len(PROMPT) + 1
    assert 1 <= found["new_tokens"] <= 6
    assert found["tokens_per_second"] is None or found["tokens_per_second"] > 0


def test_the_text_is_written_after_its_prompt(folder: Path) -> None:
    expected = mixq_json("generate", folder, "--prompt", PROMPT, "--new", "5")["text"]
    shown = mixq("generate", folder, "--prompt", PROMPT, "--new", "5")
    assert shown.stdout == f"{PROMPT}{expected}\n"
    assert "8 tokens of prompt and the first new one: " in shown.stderr


def test_the_same_seed_draws_the_same_text(folder: Path) -> None:
    arguments = ("generate", folder, "--prompt", PROMPT, "--new", "8", "--sample", "1.5")
    first, second, other = (mixq_json(*arguments, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert first == second != other
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", PROMPT, "--new", "500"), "reaches 128 tokens, and 8 + 500 were asked for"),
        (("--new", "5"), "--prompt"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    assert message in mixq("generate", folder, *arguments, code=2).stderr


def test_a_model_that_predicts_no_token() -> None:
    assert (
        "does not predict the next token"
        in mixq("generate", "tiny_models:bert", "--prompt", "a", code=1).stderr
    )
