"""Merged siblings as users meet them: compiled models, reports, loading, releasing, saving, generating."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compiling import compiled
from linear_models import Attention, rows
from rewriting import sqnr
from tiny_llama import ids, logits, tiny_llama, transformers
from torch import nn

import mixq_compile as mixq
from mixq_compile.runtime.compilation import compilations_of
from mixq_compile.runtime.weight_store import STORE

LOWERINGS = ["eager", "aot_eager"]


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval().requires_grad_(False)


def merged(model: nn.Module, **options: Any) -> Any:
    return compiled(model, merge_siblings="always", **options)


def apart(model: nn.Module, **options: Any) -> Any:
    return compiled(model, merge_siblings="never", **options)


def merges(model: nn.Module) -> list[str]:
    """What `merge-siblings` decided in the last graph of a model."""
    last = compilations_of([*model.parameters(), *model.buffers()])[-1]
    assert last.history is not None
    (record,) = (record for record in last.history.records if record.spec.startswith("merge-siblings"))
    return [decision.verdict for decision in record.decisions]


@pytest.mark.parametrize("lowering", [*LOWERINGS, "inductor"])
def test_the_same_bits_as_apart(lowering: str) -> None:
    x = rows(6, columns=(3,))
    one, other = attention(), attention()
    expected = apart(one, lowering=lowering)(x)
    assert torch.equal(merged(other, lowering=lowering)(x), expected)
    assert merges(other) == ["applied"]
    swapped = mixq.quantize(attention())
    assert sqnr(expected, merged(swapped, lowering=lowering)(x)) > 30
    assert merges(swapped) == ["applied"]


@pytest.mark.parametrize("lowering", [*LOWERINGS, "inductor"])
def test_graphs_with_and_without_merging_share_one_memory(lowering: str) -> None:
    """Apart, a graph has inputs that lie in one memory, and writes some of them."""
    model = attention()
    first, together, last = (make(model, lowering=lowering) for make in (apart, merged, apart))
    for columns in ((), (3,), (3, 40), (17,)):
        x = rows(6, columns=columns)
        found = [fast(x) for fast in (first, together, last)]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[1], found[2])
        assert sqnr(model(x), found[0]) > 30
        torch._dynamo.reset()


def test_a_report_lists_each_linear() -> None:
    reports = []
    for make in (apart, merged):
        model = attention()
        fast = make(model)
        fast(rows(6, columns=(3,)))
        report = mixq.report(fast)
        reports.append(sorted(report.quantized, key=lambda linear: linear.fqn))
    assert reports[0] == reports[1]
    assert [linear.fqn for linear in reports[1]] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert [linear.outlier_columns for linear in reports[1]] == [(3,), (), (3,), (3,)]


@pytest.mark.parametrize("swap", [False, True])
def test_other_batch_sizes_find_the_joint_weight(swap: bool) -> None:
    model = mixq.quantize(attention()) if swap else attention()
    fast = merged(model, dynamic=False)

    def addresses() -> list[int]:
        linears = (model.q_proj, model.k_proj, model.v_proj)
        codes = [
            linear.weight_codes if swap else STORE.codes(linear.weight)[0].weight_codes for linear in linears
        ]
        return [tensor.data_ptr() for tensor in codes]

    fast(rows(6, columns=(3,)))
    before = addresses()
    for count in (1, 9):
        fast(rows(count, columns=(3,)))
        assert merges(model) == ["applied"]
    assert addresses() == before
    assert len(mixq.report(fast).quantized) == 4
    assert mixq.report(fast).graphs == 3


def test_a_loaded_state_is_packed_again() -> None:
    model, other = attention(), attention()
    for parameter in other.parameters():
        parameter.mul_(-1.5)
    fast = merged(model)
    x = rows(6, columns=(3,))
    fast(x)
    model.load_state_dict(other.state_dict())
    assert sqnr(other(x), fast(x)) > 30


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_loaded_into_swapped_modules(assign: bool) -> None:
    model, other = mixq.quantize(attention()), mixq.quantize(attention())
    for module in (other.q_proj, other.k_proj):
        module.weight_codes.neg_()
    fast = merged(model)
    x = rows(6, columns=(3,))
    fast(x)
    model.load_state_dict(
        {name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=assign
    )
    with torch.no_grad():
        assert sqnr(other(x), fast(x)) > 100
    assert merges(model) == ["applied"]


@pytest.mark.parametrize("which", ["one", "all"])
def test_replaced_parameters(which: str) -> None:
    model = attention()
    fast = merged(model)
    x = rows(6, columns=(3,))
    fast(x)
    for module in (model.q_proj, model.k_proj, model.v_proj)[: 1 if which == "one" else 3]:
        module.weight = nn.Parameter(torch.randn_like(module.weight), requires_grad=False)
    assert sqnr(model(x), fast(x)) > 30
    assert merges(model) == ["skipped" if which == "one" else "applied"]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_released_weights(lowering: str) -> None:
    model, reference = attention(), attention()
    fast = merged(model, release_weights=True, lowering=lowering)
    for columns in ((), (3, 40)):
        x = rows(6, columns=columns)
        assert sqnr(reference(x), fast(x)) > 30
    for module in (model.q_proj, model.k_proj, model.v_proj):
        assert module.weight.untyped_storage().nbytes() == 0
    fast(rows(2))
    assert {linear.outlier_weight_source for linear in mixq.report(fast).quantized} == {"codes"}


def test_a_swapped_model_saves_and_loads_as_before(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = mixq.quantize(tiny_llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = merged(model)
    expected = logits(fast, ids())
    assert merges(model) == ["applied"] * 4
    after = model.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    mixq.save_pretrained(model, tmp_path)
    loaded = mixq.load_pretrained(tmp_path)
    torch._dynamo.reset()
    assert torch.equal(logits(merged(loaded), ids()), expected)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    kept = torch.load(stream)
    for name, tensor in after.items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_copy_of_a_merged_model_is_merged_on_its_own() -> None:
    model = mixq.quantize(attention())
    fast = merged(model)
    x = rows(6, columns=(3,))
    fast(x)
    other = copy.deepcopy(model)
    other.q_proj.weight_codes.neg_()
    torch._dynamo.reset()
    other_fast = merged(other)
    expected = fast(x)
    assert not torch.equal(other_fast(x), expected)
    assert merges(other) == ["applied"]
    with torch.no_grad():
        assert sqnr(other(x), other_fast(x)) > 100


def test_a_cast_model_is_merged_again() -> None:
    model = mixq.quantize(attention())
    fast = merged(model)
    fast(rows(6, columns=(3,)))
    model.bfloat16()
    x = rows(6, columns=(3,)).bfloat16()
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 30
    assert merges(model) == ["applied"]


@pytest.mark.parametrize("swap", [False, True])
def test_under_inference_mode(swap: bool) -> None:
    model = mixq.quantize(attention()) if swap else attention()
    fast = merged(model, lowering="aot_eager")
    x = rows(6, columns=(3,))
    with torch.inference_mode():
        inside = fast(x)
    with torch.no_grad():
        assert torch.equal(fast(x), inside)
    assert merges(model) == ["applied"]


def test_a_llama_with_grouped_queries() -> None:
    model, reference = tiny_llama(), tiny_llama()
    fast = merged(model)
    assert sqnr(logits(reference, ids()), logits(fast, ids())) > 20
    assert merges(model) == ["applied"] * 4, "q, k and v, and gate and up, of two layers"
    names = [linear.fqn for linear in mixq.report(fast).quantized]
    assert len(names) == len(set(names)) == 14
    other = tiny_llama()
    assert torch.equal(logits(apart(other), ids()), logits(fast, ids()))


def test_merged_modules_run_under_other_compilers_too() -> None:
    """The operator of a swapped module then writes a part of a memory that others read."""
    model = mixq.quantize(attention())
    x = rows(6, columns=(3,))
    expected = merged(model)(x)
    torch._dynamo.reset()
    with torch.no_grad():
        assert sqnr(expected, torch.compile(model, backend="aot_eager", fullgraph=True)(x)) > 100


def test_generating_with_merged_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation import utils

    monkeypatch.setattr(utils.GenerationMixin, "_valid_auto_compile_criteria", lambda *args, **kwargs: True)
    found = []
    for when in ("never", "always"):
        model = mixq.quantize(tiny_llama())
        options = {"force": True, "kernel": "ref", "lowering": "eager", "merge_siblings": when}
        config = transformers.CompileConfig(backend="mixq", fullgraph=True, mode=None, options=options)
        found.append(
            model.generate(
                ids(1, 6), attention_mask=torch.ones(1, 6, dtype=torch.long), max_new_tokens=8,
                do_sample=False, cache_implementation="static", compile_config=config,
            )
        )  # fmt: skip
        torch._dynamo.reset()
    assert merges(model) == ["applied"] * 4
    assert torch.equal(*found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("count", [1, 6, 300])
@pytest.mark.parametrize("swap", [False, True])
def test_on_a_gpu_siblings_merge_by_default(swap: bool, count: int) -> None:
    reference = attention().cuda().bfloat16()
    model = copy.deepcopy(reference)
    if swap:
        mixq.quantize(model)
    fast = compiled(model, kernel="auto", lowering="inductor", mode="reduce-overhead", dynamic=False)
    x = rows(count, columns=(3,)).cuda().bfloat16()
    for _ in range(3):
        found = fast(x).clone()
    assert merges(model) == ["applied"]
    assert sqnr(reference(x), found) > 30
