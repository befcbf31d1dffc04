"""Perplexity: each protocol's windows, the published numbers of a small model, and what may not matter."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared_data import shared_text, stories260k
from torch import Tensor, nn

from mixq_compile.errors import OptionError
from mixq_compile.evaluation import PerplexityResult, perplexity
from mixq_compile.evaluation.protocols import (
    bos_windows,
    gptq_windows,
    llamacpp_windows,
    story_windows,
    wikitext_rows,
)

BOS = 1


class CharacterTokenizer:
    """A token per character, its code point; BOS is 1."""

    bos_token_id: int | None = BOS

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        tokens = [ord(character) for character in text]
        return {"input_ids": [BOS, *tokens] if add_special_tokens and self.bos_token_id else tokens}


class NoBosTokenizer(CharacterTokenizer):
    bos_token_id = None


def uniform_model(ids: Tensor) -> Tensor:
    """Every one of 128 tokens is equally likely."""
    return torch.zeros(*ids.shape, 128)


class RecordingModel(nn.Module):
    """Predicts the next token from the one before it, and keeps the shapes it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 128)
        self.shapes: list[tuple[int, ...]] = []
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, ids: Tensor) -> Any:
        self.shapes.append(tuple(ids.shape))
        return SimpleNamespace(logits=self.table(ids))


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


class TestGptqWindows:
    def test_lines_are_joined_by_blank_lines_and_blank_ones_are_empty(self) -> None:
        assert wikitext_rows(" \n = Title = \n \n Text . \n") == ["", " = Title = \n", "", " Text . \n"]

    def test_only_newlines_end_a_row(self) -> None:
        assert wikitext_rows("a\u2028b\x0cc\nd") == ["a\u2028b\x0cc\n", "d"]

    def test_wikitext_2_has_the_published_number_of_rows(self) -> None:
        assert len(wikitext_rows(shared_text("wikitext2.test.raw"))) == 4358

    def test_one_bos_then_windows_without_overlap_and_the_remainder_dropped(self) -> None:
        windows = gptq_windows(CharacterTokenizer(), "abcdefghij", 4, None)
        assert [list(window.tokens) for window in windows] == [[BOS, *codes("abc")], codes("defg")]

    def test_all_tokens_but_the_first_of_each_window_are_scored(self) -> None:
        assert [window.scored for window in gptq_windows(CharacterTokenizer(), "abcdefghij", 4, None)] == [
            3,
            3,
        ]

    def test_a_tokenizer_without_bos_adds_none(self) -> None:
        (window, *_) = gptq_windows(NoBosTokenizer(), "abcdefghij", 4, None)
        assert list(window.tokens) == codes("abcd")

    def test_a_text_shorter_than_a_window_is_refused(self) -> None:
        with pytest.raises(OptionError, match=r"4 tokens, less than one window of 8.*window=4"):
            gptq_windows(CharacterTokenizer(), "abc", 8, None)


class TestLlamacppWindows:
    def test_the_text_is_taken_as_it_is(self) -> None:
        (window,) = llamacpp_windows(CharacterTokenizer(), "a\n \nb", 6, None)
        assert list(window.tokens) == [BOS, *codes("a\n \nb")]

    def test_the_first_token_of_every_window_is_replaced_by_bos(self) -> None:
        windows = llamacpp_windows(CharacterTokenizer(), "abcdefghij", 4, None)
        assert [list(window.tokens) for window in windows] == [[BOS, *codes("abc")], [BOS, *codes("efg")]]

    def test_without_bos_nothing_is_replaced(self) -> None:
        windows = llamacpp_windows(NoBosTokenizer(), "abcdefgh", 4, None)
        assert [list(window.tokens) for window in windows] == [codes("abcd"), codes("efgh")]

    def test_of_512_tokens_the_last_255_are_scored(self) -> None:
        (window,) = llamacpp_windows(CharacterTokenizer(), "x" * 600, 512, None)
        assert (window.first_scored, window.scored) == (257, 255)


class TestStoryWindows:
    text = "\nabc\n<|endoftext|>\n\n<|endoftext|>\nabcdefgh\n"

    def test_each_story_stands_alone_with_bos_first_and_no_outer_white_space(self) -> None:
        windows = story_windows(CharacterTokenizer(), self.text, 64, None)
        assert [list(window.tokens) for window in windows] == [
            [BOS, *codes("abc")],
            [BOS, *codes("abcdefgh")],
        ]

    def test_a_story_is_truncated_to_the_context_bos_included(self) -> None:
        windows = story_windows(CharacterTokenizer(), self.text, 5, None)
        assert [list(window.tokens) for window in windows] == [[BOS, *codes("abc")], [BOS, *codes("abcd")]]

    def test_limit_counts_stories_that_hold_text(self) -> None:
        text = "<|endoftext|>" + self.text
        assert len(story_windows(CharacterTokenizer(), text, 64, 1)) == 1
        assert len(story_windows(CharacterTokenizer(), text, 64, 2)) == 2

    def test_a_text_without_a_story_is_refused(self) -> None:
        with pytest.raises(OptionError, match="no story"):
            story_windows(CharacterTokenizer(), "<|endoftext|> \n", 64, None)


class TestArithmetic:
    @pytest.mark.parametrize("protocol", ["gptq", "llamacpp", "stories"])
    def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(self, protocol: str) -> None:
        result = perplexity(uniform_model, CharacterTokenizer(), "some text " * 9, protocol, window=16)
        assert result.perplexity == pytest.approx(128, rel=1e-6)
        assert result.nll == pytest.approx(result.tokens_scored * math.log(128), rel=1e-6)

    def test_the_loss_is_that_of_each_next_token_in_fp32(self) -> None:
        model = RecordingModel()
        text = "abcdefg"
        result = perplexity(model, CharacterTokenizer(), text, "stories")
        logits = model.table(torch.tensor([BOS, *codes(text)])).detach()
        probabilities = logits.double().log_softmax(dim=-1)
        expected = -sum(float(probabilities[place, token]) for place, token in enumerate(codes(text)))
        assert result.nll == pytest.approx(expected, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(expected / 7), rel=1e-6)

    def test_long_windows_are_scored_in_parts_without_a_seam(self) -> None:
        torch.manual_seed(0)
        table = torch.randn(128, 128)
        text = "".join(chr(97 + number * number % 26) for number in range(1299))
        result = perplexity(lambda ids: table[ids], CharacterTokenizer(), text, "gptq", window=1300)
        tokens = torch.tensor([BOS, *codes(text)])
        expected = nn.functional.cross_entropy(table[tokens[:-1]].double(), tokens[1:], reduction="sum")
        assert result.tokens_scored == 1299
        assert result.nll == pytest.approx(float(expected), rel=1e-6)

    def test_the_result_says_what_a_comparison_needs(self) -> None:
        text = "abcd" * 30
        result = perplexity(uniform_model, CharacterTokenizer(), text, "llamacpp", window=10, limit=3)
        assert result.to_json() == {
            "protocol": "llamacpp",
            "window": 10,
            "tokens_scored": 12,
            "nll": result.nll,
            "perplexity": result.perplexity,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "documents": 3,
        }
        assert "llamacpp, window 10, 12 tokens in 3 documents" in str(result)

    def test_a_hopeless_model_has_infinite_perplexity(self) -> None:
        def certain_and_wrong(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, 128).index_fill(-1, torch.tensor([5]), 1e4)

        assert (
            perplexity(certain_and_wrong, CharacterTokenizer(), "abc", "stories", window=8).perplexity
            == math.inf
        )


class TestWindowSize:
    def test_protocols_have_their_published_window(self) -> None:
        text = "x" * 3000
        for protocol, window in {"gptq": 2048, "llamacpp": 512}.items():
            assert perplexity(uniform_model, CharacterTokenizer(), text, protocol).window == window

    @pytest.mark.parametrize("protocol", ["gptq", "llamacpp", "stories"])
    def test_a_shorter_context_shortens_it(self, protocol: str) -> None:
        assert perplexity(RecordingModel(), CharacterTokenizer(), "x" * 100, protocol).window == 64

    def test_a_window_beyond_the_context_is_refused(self) -> None:
        with pytest.raises(OptionError, match="window 65 is longer than the model's context of 64"):
            perplexity(RecordingModel(), CharacterTokenizer(), "x" * 100, window=65)

    def test_stories_need_a_window_where_the_model_names_no_context(self) -> None:
        with pytest.raises(OptionError, match="give window="):
            perplexity(uniform_model, CharacterTokenizer(), "abc", "stories")


class TestPadding:
    text = "<|endoftext|>".join("abcdefghijklmnopqrstuvwxyz"[: 3 + length] for length in range(20))

    def shapes(self, **options: int) -> tuple[list[tuple[int, ...]], float]:
        torch.manual_seed(0)
        model = RecordingModel()
        nll = perplexity(model, CharacterTokenizer(), self.text, "stories", **options).nll  # type: ignore[arg-type]
        return model.shapes, nll

    def test_without_it_every_story_has_its_own_length(self) -> None:
        shapes, _ = self.shapes()
        assert shapes == [(1, 4 + length) for length in range(20)]

    def test_lengths_are_multiples_up_to_the_window(self) -> None:
        shapes, _ = self.shapes(pad_to=10)
        assert set(shapes) == {(1, 10), (1, 20), (1, 30)}
        assert {length for _, length in self.shapes(pad_to=10, window=22)[0]} == {10, 20, 22}

    def test_batches_too_keep_to_few_shapes(self) -> None:
        shapes, _ = self.shapes(pad_to=10, batch_size=8)
        assert set(shapes) == {(8, 10), (8, 20), (8, 30)}

    @pytest.mark.parametrize("options", [{"batch_size": 3}, {"pad_to": 16}, {"batch_size": 3, "pad_to": 16}])
    def test_the_result_stays(self, options: dict[str, int]) -> None:
        assert self.shapes(**options)[1] == pytest.approx(self.shapes()[1], rel=1e-9)

    def test_a_compiled_model_meets_one_graph_per_padded_length(self) -> None:
        graphs = []

        def counting_backend(module: Any, inputs: Any) -> Any:
            graphs.append(module)
            return module.forward

        torch._dynamo.reset()
        plain = nn.Sequential(nn.Embedding(128, 8), nn.Linear(8, 128))
        compiled = torch.compile(plain, backend=counting_backend, dynamic=False)
        arguments = (CharacterTokenizer(), self.text, "stories", None, 30)
        result = perplexity(compiled, *arguments, pad_to=10)
        assert len(graphs) == 3
        assert result.nll == pytest.approx(perplexity(plain, *arguments).nll, rel=1e-6)


class TestModels:
    def test_training_flags_are_restored_after_a_run_in_eval_mode(self) -> None:
        class Watching(RecordingModel):
            def forward(self, ids: Tensor) -> Any:
                assert not self.training
                assert not torch.is_grad_enabled()
                return super().forward(ids)

        model = Watching().train()
        model.table.eval()
        perplexity(model, CharacterTokenizer(), "abc", "stories")
        assert (model.training, model.table.training) == (True, False)

    def test_a_tuple_of_outputs_will_do(self) -> None:
        result = perplexity(
            lambda ids: (uniform_model(ids), None), CharacterTokenizer(), "abc", "stories", window=8
        )
        assert result.perplexity == pytest.approx(128, rel=1e-6)

    def test_a_model_on_the_meta_device_is_refused(self) -> None:
        with pytest.raises(OptionError, match="meta device"):
            perplexity(RecordingModel().to("meta"), CharacterTokenizer(), "abc", "stories")


class TestErrors:
    def test_an_unknown_protocol_lists_the_known_ones(self) -> None:
        with pytest.raises(OptionError, match=r"'gtpq'. Did you mean 'gptq'.*gptq, llamacpp, stories"):
            perplexity(uniform_model, CharacterTokenizer(), "abc", "gtpq")

    @pytest.mark.parametrize("name", ["limit", "window", "batch_size", "pad_to"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True])
    def test_numbers_out_of_range_are_named(self, name: str, value: Any) -> None:
        with pytest.raises(OptionError, match=name):
            perplexity(uniform_model, CharacterTokenizer(), "abc", **{name: value})


class TestStories260k:
    """A really trained Llama; `decisions.md` 33 gives the numbers."""

    def run(self, limit: int | None = None, **options: Any) -> PerplexityResult:
        model, tokenizer = stories260k()
        return perplexity(model, tokenizer, shared_text("tinystories.txt"), "stories", limit, **options)

    def test_80_stories(self) -> None:
        result = self.run(80)
        assert round(result.perplexity, 3) == 3.921
        assert (result.window, result.documents, result.tokens_scored) == (512, 80, 28436)

    def test_all_200_stories(self) -> None:
        result = self.run(batch_size=4)
        assert round(result.perplexity, 3) == 4.394
        assert result.documents == 200

    def test_padding_and_batching_change_nothing_but_rounding(self) -> None:
        alone = self.run(12).nll
        assert self.run(12, batch_size=4).nll == pytest.approx(alone, rel=1e-7)
        assert self.run(12, batch_size=4, pad_to=128).nll == pytest.approx(alone, rel=1e-7)

    def test_wikitext_by_both_protocols(self) -> None:
        model, tokenizer = stories260k()
        text = shared_text("wikitext2.test.raw")
        gptq = perplexity(model, tokenizer, text, "gptq", 4)
        llamacpp = perplexity(model, tokenizer, text, "llamacpp", 4)
        assert (gptq.window, gptq.tokens_scored) == (512, 4 * 511)
        assert (llamacpp.window, llamacpp.tokens_scored) == (512, 4 * 255)
        assert gptq.text_sha256 == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
        assert llamacpp.perplexity < gptq.perplexity


def test_windows_begin_with_bos_each() -> None:
    found = bos_windows(CharacterTokenizer(), "ab\ncdefg", 4, None)
    # The lines are joined by a blank one: a b \n \n c d e f g, three to a window, the rest is dropped.
    assert [window.tokens for window in found] == [(BOS, *map(ord, part)) for part in ("ab\n", "\ncd", "efg")]
    assert {window.first_scored for window in found} == {1}
    assert len(bos_windows(CharacterTokenizer(), "ab\ncdefg", 4, 2)) == 2


def test_windows_of_a_tokenizer_without_bos_begin_with_their_first_token() -> None:
    found = bos_windows(NoBosTokenizer(), "abcdefgh", 4, None)
    assert [window.tokens for window in found] == [tuple(map(ord, part)) for part in ("abcd", "efgh")]
    assert {window.scored for window in found} == {3}
