"""`prepare_for_generation`: the same text as the unprepared model's, and nothing compiled twice."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_llama import ids, transformers
from tiny_llama import tiny_llama as two_layers
from torch import Tensor

import mixq_compile as mixq
from mixq_compile.errors import OptionError
from mixq_compile.runtime.generation import prepared_generation

SIZES: dict[str, Any] = {
    "max_length": 64,
    "batch_sizes": (1, 4),
    "prompt_lengths": (8, 16),
    "cache_lengths": (32, 64),
}


def tiny_llama() -> Any:
    """One layer, since tracing is what takes these tests their time."""
    return two_layers(num_hidden_layers=1)


TRACED: dict[str, Any] = {"backend": "eager"}
"""Compiled without code generation: what is tested is what runs, not how fast."""
QUANTIZED: dict[str, Any] = {
    "backend": "mixq",
    "options": {"lowering": "eager", "kernel": "ref", "force": True},
}
PROMPTS = [
    pytest.param((6,), 8, id="shorter than its bucket"),
    pytest.param((8,), 8, id="as long as its bucket"),
    pytest.param((12,), 12, id="the next bucket"),
    pytest.param((1,), 5, id="one token"),
    pytest.param((20,), 8, id="longer than every bucket"),
    pytest.param((7, 4), 8, id="a batch filled up, one row shorter"),
    pytest.param((9, 5, 9, 1), 8, id="a whole batch, rows of four lengths"),
    pytest.param((14,), 40, id="the longer cache"),
]


def prompts(lengths: Sequence[int], seed: int = 3) -> dict[str, Tensor]:
    """Tokens of these lengths, with zeros before the shorter ones, and their mask."""
    longest = max(lengths)
    tokens = ids(len(lengths), longest, seed)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def text(model: Any, lengths: Sequence[int] = (6,), new: int = 6, seed: int = 3, **given: Any) -> Tensor:
    """Greedy tokens, unless told otherwise."""
    return model.generate(**prompts(lengths, seed), **{"max_new_tokens": new, "do_sample": False, **given})


def graphs() -> int:
    """How many graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    """An unquantized model, and the same prepared."""
    return tiny_llama(), mixq.prepare_for_generation(tiny_llama(), **SIZES, **TRACED)


@pytest.fixture(scope="module")
def swapped() -> tuple[Any, Any]:
    """A quantized model, and the same prepared."""
    model = mixq.prepare_for_generation(mixq.quantize(tiny_llama()), **SIZES, **QUANTIZED)
    return mixq.quantize(tiny_llama()), model


@pytest.mark.parametrize(("lengths", "new"), PROMPTS)
def test_the_text_is_that_of_the_unprepared_model(plain: Any, lengths: tuple[int, ...], new: int) -> None:
    model, prepared = plain
    assert torch.equal(text(prepared, lengths, new), text(model, lengths, new))


@pytest.mark.parametrize(("lengths", "new"), PROMPTS)
def test_a_quantized_model_writes_the_same_text_too(swapped: Any, lengths: tuple[int, ...], new: int) -> None:
    model, prepared = swapped
    mixq.reset(model)
    mixq.reset(prepared)
    assert torch.equal(text(prepared, lengths, new), text(model, lengths, new))


def test_an_ordinary_model_is_quantized_by_the_backend() -> None:
    prepared = mixq.prepare_for_generation(tiny_llama(), **SIZES, **QUANTIZED)
    found, expected = text(prepared, (6,), 8), text(tiny_llama(), (6,), 8)
    assert len(mixq.report(prepared).quantized) == 7
    agreed = int((found == expected).long().cumprod(dim=1).sum()) - 6
    assert agreed >= 4, f"the text agrees with the unquantized model's for {agreed} of 8 tokens"


def test_another_prompt_compiles_nothing(plain: Any) -> None:
    _, prepared = plain
    for lengths in ((5,), (4, 4), (16,), (3, 3)):
        text(prepared, lengths)
    before = graphs()
    for lengths in ((1,), (3,), (8,), (11,), (16,), (2, 5), (6, 6, 6), (16, 3, 2, 8)):
        text(prepared, lengths, new=9, seed=len(lengths))
    assert graphs() == before, "a prompt of another length or batch was compiled anew"


def test_prompts_of_any_length_share_a_compilation_without_buckets() -> None:
    prepared = mixq.prepare_for_generation(tiny_llama(), max_length=32, batch_sizes=1, **TRACED)
    text(prepared, (5,))
    before = graphs()
    model = tiny_llama()
    for length in (1, 2, 9, 17, 24):
        assert torch.equal(text(prepared, (length,)), text(model, (length,)))
    assert graphs() == before


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"do_sample": True, "top_k": 20}, id="sampling"),
        pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several samples"),
        pytest.param({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, id="logits processors"),
        pytest.param({"eos_token_id": list(range(0, 96, 3)), "pad_token_id": 0}, id="end tokens"),
        pytest.param({"min_new_tokens": 5, "eos_token_id": 5}, id="least tokens"),
        pytest.param({"max_new_tokens": None, "max_length": 20}, id="max_length"),
        pytest.param({"cache_implementation": "static"}, id="the static cache asked for"),
        pytest.param({"stopping_criteria": [
            lambda tokens, scores, **_: torch.full((2,), tokens.shape[1] > 9)]}, id="stopping criteria"),
    ],
)  # fmt: skip
def test_what_generate_offers_works(plain: Any, given: dict[str, Any]) -> None:
    model, prepared = plain
    texts = []
    for each in (model, prepared):
        torch.manual_seed(7)
        chosen = dict(given)
        if "stopping_criteria" in chosen:
            chosen["stopping_criteria"] = transformers.StoppingCriteriaList(chosen["stopping_criteria"])
        texts.append(text(each, (7, 5), 8, **chosen))
    assert torch.equal(*texts)


def test_a_generation_config_is_obeyed_and_left_as_it_was(plain: Any) -> None:
    model, prepared = plain
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, cache_implementation="static")
    before = config.to_dict()
    texts = [each.generate(**prompts((6,)), generation_config=config) for each in (model, prepared)]
    assert torch.equal(*texts)
    assert config.to_dict() == before


def test_tokens_are_streamed(plain: Any) -> None:
    class Heard:
        def __init__(self) -> None:
            self.tokens: list[list[int]] = []

        def put(self, tokens: Tensor) -> None:
            self.tokens.append(tokens.flatten().tolist())

        def end(self) -> None:
            self.tokens.append([])

    heard = [Heard(), Heard()]
    for model, streamer in zip(plain, heard, strict=True):
        text(model, (6,), 5, streamer=streamer)
    assert heard[0].tokens == heard[1].tokens


def test_scores_and_the_returned_cache_are_the_callers_own(plain: Any) -> None:
    model, prepared = plain
    wanted, found = (
        text(each, (7, 5), 6, return_dict_in_generate=True, output_scores=True, output_logits=True)
        for each in plain
    )
    text(prepared, (4, 4), 9, seed=11)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.scores, wanted.scores)
    torch.testing.assert_close(found.logits, wanted.logits)
    assert type(found.past_key_values) is type(wanted.past_key_values)
    for mine, theirs in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        # Nobody sees what stands before a prompt, and it is filled up otherwise.
        torch.testing.assert_close(mine.keys[0], theirs.keys[0])
        torch.testing.assert_close(mine.values[1, :, 2:], theirs.values[1, :, 2:])
    mask = torch.cat([prompts((7, 5))["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    more = [
        each.generate(
            wanted.sequences,
            attention_mask=mask,
            past_key_values=kept.past_key_values,
            max_new_tokens=4,
            do_sample=False,
        )
        for each, kept in ((model, wanted), (prepared, found))
    ]
    assert torch.equal(*more), "the text does not go on from the returned cache"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"use_cache": False}, "use_cache=False"),
        ({"disable_compile": True}, "disable_compile"),
        ({"max_new_tokens": 80}, "raise max_length"),
        ({"num_return_sequences": 5, "do_sample": True}, "batch_sizes"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_other_calls_run_as_they_did_and_say_why_once(
    given: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, prepared = tiny_llama(), mixq.prepare_for_generation(tiny_llama(), **SIZES, **TRACED)
    texts = []
    before = graphs()
    with caplog.at_level(logging.WARNING, "mixq_compile"):
        for each in (model, prepared, prepared):
            torch.manual_seed(7)
            found = text(each, (6,), **given)
            texts.append(found if isinstance(found, Tensor) else found.sequences)
    assert torch.equal(texts[0], texts[1])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("mixq_compile")]
    assert len(said) == 1, said
    assert reason in said[0]
    assert graphs() == before


def test_an_assistant_that_is_prepared_helps_a_model_that_is_prepared(plain: Any) -> None:
    model, prepared = plain
    assert torch.equal(text(prepared, (6,), 8, assistant_model=prepared), text(model, (6,), 8))


def test_restoring_gives_the_models_own_generate_back(plain: Any) -> None:
    model, _ = plain
    other = tiny_llama()
    before = dict(other.__dict__)
    mixq.prepare_for_generation(other, **SIZES, **TRACED)
    text(other)
    assert mixq.restore_generation(other)
    assert {name for name in other.__dict__ if name not in before} == set()
    compiled = graphs()
    assert torch.equal(text(other, (13,), 5), text(model, (13,), 5))
    assert graphs() == compiled
    assert not mixq.restore_generation(other), "it was restored already"


def test_fifty_calls_keep_nothing(swapped: Any) -> None:
    _, prepared = swapped
    inside = prepared_generation(prepared)

    def tensors() -> list[Tensor]:
        gc.collect()
        return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]

    for lengths in ((6,), (12,), (3, 3)):
        text(prepared, lengths, 2)
    # Other tests' garbage may be freed meanwhile, so tensors are told apart and not counted.
    before = {id(each): each for each in tensors()}
    sizes = len(inside.compiled), inside.caches.nbytes
    for number in range(50):
        text(prepared, ((6,), (12,), (3, 3))[number % 3], 2, seed=number)
    assert (len(inside.compiled), inside.caches.nbytes) == sizes
    new = [tuple(each.shape) for each in tensors() if id(each) not in before]
    assert len(new) < 50, f"50 calls left {len(new)} tensors: {new[:8]}"


def test_caches_of_all_sizes_share_one_memory() -> None:
    prepared = mixq.prepare_for_generation(tiny_llama(), **SIZES, **TRACED)
    inside = prepared_generation(prepared)
    token = 2 * 2 * 16 * 4  # keys and values, heads, width, bytes of fp32
    text(prepared, (6,))
    assert inside.caches.nbytes == 32 * token
    text(prepared, (6, 6))
    assert inside.caches.nbytes == 4 * 32 * token
    assert torch.equal(text(prepared, (6,)), text(tiny_llama(), (6,))), "the larger broke the smaller one"
    assert inside.caches.nbytes == 4 * 32 * token


def test_what_a_call_leaves_in_the_cache_spoils_no_other(plain: Any) -> None:
    model, prepared = plain
    text(prepared, (6,))
    for layer in prepared_generation(prepared).caches._caches[1, 32].layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.inf)
    assert torch.equal(text(prepared, (9,)), text(model, (9,)))


def test_a_copy_and_a_pickle_generate_with_their_own_weights() -> None:
    prepared = mixq.prepare_for_generation(tiny_llama(), **SIZES, **TRACED)
    text(prepared)
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert prepared_generation(other).model is other
        other.lm_head.weight.data.neg_()
        model = tiny_llama()
        model.lm_head.weight.data.neg_()
        assert torch.equal(text(other), text(model)), "the copy runs the original"


def test_a_call_that_fails_leaves_the_model_as_it_was(plain: Any) -> None:
    model, prepared = plain

    def fail(tokens: Tensor, scores: Any, **given: Any) -> Tensor:
        raise KeyboardInterrupt

    before = set(prepared.__dict__)
    with pytest.raises(KeyboardInterrupt):
        text(prepared, stopping_criteria=transformers.StoppingCriteriaList([fail]))
    assert set(prepared.__dict__) == before
    assert torch.equal(text(prepared), text(model))


def test_threads_take_turns(plain: Any) -> None:
    model, prepared = plain
    wanted = [text(model, (6,), 12, seed=seed) for seed in range(4)]
    found: dict[int, Tensor] = {}
    logits: list[Tensor] = []

    def run(seed: int) -> None:
        found[seed] = text(prepared, (6,), 12, seed=seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        logits += [prepared(ids()).logits for _ in range(4)]
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(4))
    assert all(torch.equal(each, model(ids()).logits) for each in logits), (
        "another thread's forward was taken over"
    )


def test_a_model_moved_to_another_dtype_generates_in_it() -> None:
    prepared = mixq.prepare_for_generation(tiny_llama(), **SIZES, **TRACED)
    text(prepared)
    assert torch.equal(text(prepared.double()), text(tiny_llama().double()))


def test_weights_written_after_preparing_are_used(plain: Any) -> None:
    prepared = mixq.prepare_for_generation(tiny_llama(), **SIZES, **TRACED)
    text(prepared)
    with torch.no_grad():
        prepared.lm_head.weight.neg_()
    model = tiny_llama()
    model.lm_head.weight.data.neg_()
    assert torch.equal(text(prepared), text(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lenght": 64}, "max_length"),
        ({"max_length": 65}, "context of 64"),
        ({"max_length": 32, "cache_lengths": (64,)}, "more than max_length=32"),
        ({"batch_sizes": (0,)}, "from 1"),
        ({"batch_sizes": "four"}, "whole numbers"),
        ({"prompt_lengths": (1,)}, "from 2"),
        ({"backend": "mixk"}, "mixq"),
        ({"mode": "fast"}, "reduce-overhead"),
        ({"options": {"shceme": "w8a8"}}, "scheme"),
        ({"options": {"mode": "reduce-overhead"}}, "mode="),
        ({"warm_up": "yes"}, "True or False"),
    ],
)  # fmt: skip
def test_wrong_options_are_named_before_anything_runs(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(OptionError, match=message):
        mixq.prepare_for_generation(model, **options)
    assert prepared_generation(model) is None


def test_models_that_cannot_be_prepared_say_why() -> None:
    with pytest.raises(OptionError, match="no transformers model"):
        mixq.prepare_for_generation(torch.nn.Linear(4, 4))
    with pytest.raises(OptionError, match=r"torch\.compile"):
        mixq.prepare_for_generation(torch.compile(tiny_llama()))
    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=32, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(OptionError, match="StaticSlidingWindowLayer"):
        mixq.prepare_for_generation(transformers.MistralForCausalLM(config).eval())
