"""What a prepared `generate()` teaches: the tokens of the call, and neither warm-up nor what fills up."""

from __future__ import annotations

from typing import Any

import torch
from test_prepared_generation import QUANTIZED, SIZES, text, tiny_llama
from torch import Tensor

import mixq_compile as mixq

ONLY_OF_PADDING = 9
"""A channel that is an outlier in the embedding of token 0 and in no other."""


def model_with_loud_padding() -> Any:
    """A Llama whose padding token would teach a column that no text teaches."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data[0].zero_()
    model.model.embed_tokens.weight.data[0, ONLY_OF_PADDING] = 100.0
    return mixq.quantize(model)


def columns(model: Any) -> dict[str, list[int]]:
    """The outlier columns of each linear, in the order in which they were found."""
    return {
        name: module.outlier_state().columns()
        for name, module in model.named_modules()
        if isinstance(module, mixq.MixqLinear)
    }


def states(model: Any) -> dict[str, Tensor]:
    """Every buffer of every outlier state."""
    return {
        f"{name}.{field}": getattr(module, field).clone()
        for name, module in model.named_modules()
        if isinstance(module, mixq.MixqLinear)
        for field in ("index", "column_slot", "column_max", "counters", "effective_threshold")
    }


def test_padding_teaches_the_unprepared_model() -> None:
    """What the other tests could not see otherwise."""
    model = model_with_loud_padding()
    text(model, (7, 3), 2)
    assert ONLY_OF_PADDING in columns(model)["model.layers.0.self_attn.q_proj"]


def test_padding_teaches_a_prepared_model_nothing() -> None:
    prepared = mixq.prepare_for_generation(model_with_loud_padding(), **SIZES, **QUANTIZED)
    for lengths in ((7, 3), (16, 2, 9)):
        text(prepared, lengths, 2)
    assert ONLY_OF_PADDING not in columns(prepared)["model.layers.0.self_attn.q_proj"]


def test_a_prompt_that_is_filled_up_teaches_what_it_teaches_alone() -> None:
    """Every buffer, the largest magnitudes too: what fills up has no value that the prompt has not."""
    alone = mixq.quantize(tiny_llama())
    prepared = mixq.prepare_for_generation(mixq.quantize(tiny_llama()), **SIZES, **QUANTIZED)
    for lengths in ((5,), (11, 11)):
        text(alone, lengths, 4)
        text(prepared, lengths, 4)
    wanted, found = states(alone), states(prepared)
    assert any(columns(alone).values())
    for name, buffer in wanted.items():
        torch.testing.assert_close(found[name], buffer, msg=lambda text, name=name: f"{name}: {text}")


def test_warming_up_compiles_everything_and_teaches_nothing() -> None:
    from test_prepared_generation import graphs

    model = model_with_loud_padding()
    before = states(model)
    prepared = mixq.prepare_for_generation(
        model,
        max_length=32,
        batch_sizes=(1, 2),
        prompt_lengths=(8, 16),
        cache_lengths=(32,),
        warm_up=True,
        **QUANTIZED,
    )
    for name, buffer in states(prepared).items():
        assert torch.equal(buffer, before[name]), f"{name} was changed by warming up"
    compiled = graphs()
    found = text(prepared, (5,), 6), text(prepared, (9, 12), 6)
    assert graphs() == compiled, "the first call compiled"
    other = model_with_loud_padding()
    assert torch.equal(found[0], text(other, (5,), 6))
    assert found[1].shape == (2, 18)
    assert any(columns(prepared).values()), "nothing is learned after warming up"


def test_preparing_a_model_teaches_nothing() -> None:
    model = mixq.quantize(tiny_llama())
    before = states(model)
    mixq.prepare_for_generation(model, **SIZES)
    assert all(torch.equal(buffer, before[name]) for name, buffer in states(model).items())
