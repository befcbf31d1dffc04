"""The same through Inductor, which generates code: a few cases, because each takes seconds to compile."""

from __future__ import annotations

import pytest
import torch
from compiling import FEATURES, block, compiled, rows
from rewriting import sqnr
from torch import nn

import mixq_compile as mixq
from mixq_compile.runtime.weight_store import STORE


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Nothing comes from an earlier run's compiled code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def test_growing_changing_and_written_models() -> None:
    reference, model = block(), block()
    fast = compiled(model, lowering="inductor", dynamic=True)
    assert sqnr(reference(rows()), fast(rows())) > 30
    x = rows(9, columns=(3, 40), size=300.0)
    assert sqnr(reference(x), fast(x)) > 30, "a column of a later call"
    assert mixq.report(fast).quantized[0].outlier_columns == (3, 40)
    assert mixq.report(fast).graphs == 1
    model.load_state_dict({name: -tensor for name, tensor in reference.state_dict().items()})
    assert sqnr(model(x), fast(x)) > 30, "a written weight"


def test_freed_weights() -> None:
    reference, model = block(), block()
    fast = compiled(model, lowering="inductor", release_weights=True)
    assert sqnr(reference(rows()), fast(rows())) > 30
    assert STORE.is_released(model.up_proj.weight)
    x = rows(9, columns=(3,))
    assert sqnr(reference(x), fast(x)) > 30, "a recompilation after the weights were freed"


def test_a_swapped_model_and_code_from_the_cache_belong_to_their_own_options() -> None:
    """Inductor's cache must not return code of other options: the graph itself differs."""
    x = rows(columns=(3,))
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES)).eval().requires_grad_(False)
    plain = torch.compile(model, backend="inductor", dynamic=False)(x)
    torch._dynamo.reset()
    eight = compiled(model, lowering="inductor", dynamic=False)(x)
    torch._dynamo.reset()
    weight_only = compiled(model, lowering="inductor", dynamic=False, scheme="w8a16")(x)
    assert 30 < sqnr(plain, eight) < 60
    assert sqnr(plain, weight_only) > 30
    assert not torch.equal(eight, weight_only)
    swapped = mixq.quantize(model)
    expected = swapped(x)
    torch._dynamo.reset()
    mixq.reset(swapped)
    assert sqnr(expected, compiled(swapped, lowering="inductor", dynamic=False)(x)) > 60
