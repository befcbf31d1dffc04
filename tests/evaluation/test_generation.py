"""Greedy text: the published one, the same through a compiled model, and where two texts part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_data import stories260k

from mixq_compile.errors import OptionError
from mixq_compile.evaluation import compare_generation, generate_text

PROMPT = "Once upon a time"
PUBLISHED = (
    ", there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


class TestGenerateText:
    def test_the_small_model_writes_its_published_text(self) -> None:
        model, tokenizer = stories260k()
        assert generate_text(model, tokenizer, PROMPT, 60).startswith(PUBLISHED)

    def test_an_empty_prompt_starts_from_bos(self) -> None:
        model, tokenizer = stories260k()
        assert generate_text(model, tokenizer, "", 30).startswith("Once upon a time, there was a little girl")

    def test_no_more_than_the_asked_number_of_tokens_is_added(self) -> None:
        model, tokenizer = stories260k()
        text = generate_text(model, tokenizer, PROMPT, 5)
        assert PUBLISHED.startswith(text)
        assert len(tokenizer(PROMPT + text)["input_ids"]) <= len(tokenizer(PROMPT)["input_ids"]) + 5

    def test_further_options_reach_generate(self) -> None:
        model, tokenizer = stories260k()
        comma = tokenizer(PROMPT + ",")["input_ids"][-1]
        assert generate_text(model, tokenizer, PROMPT, 30, eos_token_id=comma) == ","

    def test_a_compiled_model_writes_the_same_and_runs_compiled(self) -> None:
        model, tokenizer = stories260k()
        calls = []

        def counting_backend(module: Any, inputs: Any) -> Any:
            def forward(*args: Any) -> Any:
                calls.append(1)
                return module.forward(*args)

            return forward

        torch._dynamo.reset()
        compiled = torch.compile(model, backend=counting_backend)
        assert generate_text(compiled, tokenizer, PROMPT, 9) == generate_text(model, tokenizer, PROMPT, 9)
        assert len(calls) == 9

    def test_a_model_without_generate_stops_at_its_end_token(self) -> None:
        _, tokenizer = stories260k()
        ends = [tokenizer(PROMPT + ",")["input_ids"][-1], tokenizer.eos_token_id]

        def comma_then_end(ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*ids.shape, 512)
            asked = len(tokenizer(PROMPT)["input_ids"])
            logits[:, asked - 1, ends[0]] = 1
            logits[:, asked, ends[1]] = 1
            return logits

        assert generate_text(comma_then_end, tokenizer, PROMPT, 50) == ","

    def test_the_text_ends_with_the_context(self) -> None:
        model, tokenizer = stories260k()
        tokens = tokenizer(PROMPT)["input_ids"]

        class Small(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.config = type("Config", (), {"max_position_embeddings": len(tokens) + 3})()

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = model(input_ids, use_cache=False).logits
                return logits

        text = generate_text(Small(), tokenizer, PROMPT, 50)
        assert text == generate_text(model, tokenizer, PROMPT, 3)

    def test_options_need_a_generate_that_takes_them(self) -> None:
        _, tokenizer = stories260k()
        with pytest.raises(OptionError, match="no generate of its own to take top_k"):
            generate_text(lambda ids: ids, tokenizer, PROMPT, 5, top_k=3)

    @pytest.mark.parametrize("count", [0, -1, 1.5, True])
    def test_the_number_of_tokens_is_positive(self, count: Any) -> None:
        model, tokenizer = stories260k()
        with pytest.raises(OptionError, match="max_new_tokens"):
            generate_text(model, tokenizer, PROMPT, count)


class TestCompareGeneration:
    def test_equal_texts(self) -> None:
        result = compare_generation("the cat sat", "the cat sat")
        assert (result.equal_tokens, result.identical) == (3, True)

    def test_words_are_counted_until_the_texts_part(self) -> None:
        result = compare_generation("the cat sat down", "the cat ran down")
        assert (result.equal_tokens, result.reference_tokens, result.tokens) == (2, 4, 4)
        assert not result.identical

    def test_a_text_that_stops_early_is_not_identical(self) -> None:
        assert not compare_generation("the cat sat", "the cat").identical

    def test_white_space_counts(self) -> None:
        assert compare_generation("the cat", "the\ncat").equal_tokens == 1

    def test_a_tokenizer_s_tokens_are_counted_where_one_is_given(self) -> None:
        _, tokenizer = stories260k()
        text = "Once upon a time, there was a cat."
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert compare_generation(text, text, tokenizer).equal_tokens == len(tokens)

    def test_empty_texts(self) -> None:
        assert compare_generation("", "").identical
