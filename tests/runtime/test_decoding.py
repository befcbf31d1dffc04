"""Decoder models in `generate()`: static cache, compiled decode, eager prefill, one state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rewriting import sqnr
from tiny_llama import ids, logits, tiny_llama, transformers

import mixq_compile as mixq

SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
PLANTED = 7


def compile_config(**options: Any) -> Any:
    """The backend as `generate` takes it; torch refuses a mode beside options."""
    chosen = {"force": True, "kernel": "ref", "lowering": "eager", **options}
    return transformers.CompileConfig(backend="mixq", fullgraph=True, mode=None, options=chosen)


def generate(model: Any, **options: Any) -> torch.Tensor:
    """Greedy tokens of a prompt, decoded by the compiled model."""
    return model.generate(
        ids(1, 6),
        attention_mask=torch.ones(1, 6, dtype=torch.long),
        **SETTINGS,
        compile_config=compile_config(**options),
    )


def compiled_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `generate` compile on a CPU too, which transformers leaves out by default."""
    from transformers.generation import utils

    monkeypatch.setattr(utils.GenerationMixin, "_valid_auto_compile_criteria", lambda *args, **kwargs: True)


@pytest.mark.parametrize("entrance", ["backend", "quantize"])
def test_greedy_tokens_are_those_of_the_eager_model(entrance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_decode(monkeypatch)
    reference = tiny_llama()
    model = tiny_llama()
    if entrance == "quantize":
        mixq.quantize(model)
    plain = reference.generate(
        ids(1, 6), attention_mask=torch.ones(1, 6, dtype=torch.long), **SETTINGS, disable_compile=True
    )
    found = generate(model)
    assert found.shape == plain.shape
    report = mixq.report(model)
    assert len(report.quantized) == 14
    assert report.graphs >= 1, "generate compiled nothing"
    agreed = int((found == plain).long().cumprod(dim=1).sum()) - 6
    assert agreed >= 4, f"greedy tokens agree for {agreed} of 8"


def test_eager_prefill_and_compiled_decode_share_one_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prefill learns in eager mode the compiled decode starts with, and the other way round."""
    compiled_decode(monkeypatch)
    model = mixq.quantize(tiny_llama())
    attention = model.model.layers[0].self_attn
    logits(model, ids(2, 7))
    eager = [
        module.outlier_state().columns() for module in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    assert eager[0]
    assert eager[0] == eager[1] == eager[2]
    generate(model)
    states = [module.outlier_state() for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({state.index.data_ptr() for state in states}) == 1, "the compiled graph bound no states"
    assert states[1].columns()[: len(eager[0])] == eager[0], "the decode started cold"
    before = logits(model, ids(2, 7))
    assert sqnr(logits(tiny_llama(), ids(2, 7)), before) > 20


def test_the_mode_that_generate_gives_by_default_is_understood() -> None:
    """`CompileConfig` has mode="reduce-overhead" unless told otherwise."""
    assert transformers.CompileConfig(backend="mixq").mode == "reduce-overhead"
    model = tiny_llama()
    fast = torch.compile(model, backend="mixq", mode="default")
    from mixq_compile.runtime.options import MixqOptions

    assert MixqOptions.from_user("reduce-overhead").inductor_patches() == {"triton.cudagraphs": True}
    del fast


def test_decoding_step_by_step_with_a_static_cache() -> None:
    """Prefill and decode compiled by hand: the recompilation for one token packs nothing and stays warm."""
    reference, model = tiny_llama(), tiny_llama()
    fast = torch.compile(
        model, backend="mixq", options={"force": True, "kernel": "ref", "lowering": "eager"}, dynamic=False
    )
    tokens = ids(1, 9)

    def run(network: Any, config_of: Any) -> torch.Tensor:
        cache = transformers.StaticCache(config=config_of.config, max_cache_len=16)
        with torch.no_grad():
            steps = [network(tokens[:, :6], past_key_values=cache, use_cache=True).logits[:, -1]]
            steps += [
                network(tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits[:, -1]
                for place in range(6, 9)
            ]
        return torch.stack(steps)

    assert sqnr(run(reference, reference), run(fast, model)) > 20
    report = mixq.report(fast)
    assert len(report.quantized) == 14
    q_proj = next(linear for linear in report.quantized if linear.fqn == "model.layers.0.self_attn.q_proj")
    assert q_proj.outlier_columns, "the planted channel was not found"


def test_a_copy_of_a_swapped_model_decodes_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_decode(monkeypatch)
    model = mixq.quantize(tiny_llama())
    other = copy.deepcopy(model)
    generate(model)
    columns = [linear.outlier_columns for linear in mixq.report(other).quantized]
    assert not any(columns), "a copy learned from the original's traffic"
    assert torch.equal(generate(other), generate(other))
