"""`release_weights`: storage is freed, what needs it says so, and the compiled model goes on."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from compiling import FEATURES, Block, block, compiled, rows
from linear_models import statistics
from rewriting import sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import MixqError, ReleasedWeightError
from mixq_compile.runtime.weight_store import STORE


def released(model: nn.Module | None = None, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model and its compilation, which has run once and freed its weights."""
    model = model or block()
    fast = compiled(model, release_weights=True, **options)
    fast(rows())
    return model, fast


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_storage_is_freed_and_the_model_runs_on(lowering: str) -> None:
    reference = block()
    model, fast = released(lowering=lowering)
    for weight in (model.up_proj.weight, model.down_proj.weight):
        assert weight.untyped_storage().nbytes() == 0
        assert weight.shape[0] > 0, "Dynamo guards on the shape"
    assert model.lm_head.weight.untyped_storage().nbytes() > 0, "a weight that is still read was freed"
    x = rows(columns=(3,))
    assert sqnr(reference(x), fast(x)) > 30


def test_columns_found_later_come_from_the_codes() -> None:
    reference = block()
    _, fast = released()
    x = rows(columns=(3, 40), size=300.0)
    assert sqnr(reference(x), fast(x)) > 30
    report = mixq.report(fast)
    assert {linear.outlier_weight_source for linear in report.quantized} == {"codes"}
    assert not any(linear.float_weight_kept for linear in report.quantized)


NEEDS: dict[str, Callable[[nn.Module], object]] = {
    "run": lambda model: model(rows()),
    "run a linear": lambda model: model.up_proj(rows()),
    "state_dict": lambda model: model.state_dict(),
    "save": lambda model: torch.save(model.state_dict(), io.BytesIO()),
    "pickle": lambda model: torch.save(model, io.BytesIO()),
    "load_state_dict": lambda model: model.load_state_dict(Block().state_dict()),
    "to dtype": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "to device": lambda model: model.to("meta"),
    "deepcopy": lambda model: copy.deepcopy(model),
    "quantize": lambda model: mixq.quantize(model),
}


@pytest.mark.parametrize("need", NEEDS)
def test_what_needs_the_weight_names_the_option(need: str) -> None:
    model, fast = released()
    with pytest.raises(ReleasedWeightError, match=r"release_weights"):
        NEEDS[need](model)
    fast(rows())


def test_save_pretrained_names_the_option(tmp_path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    compiled(model, release_weights=True)(torch.arange(8)[None])
    with pytest.raises(ReleasedWeightError, match="release_weights"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_recompilation_afterwards_works(lowering: str) -> None:
    reference = block()
    _, fast = released(lowering=lowering, dynamic=False)
    for count in (9, 1, 30):
        x = rows(count, columns=(3,))
        assert sqnr(reference(x), fast(x)) > 30, f"{count} rows"
    assert mixq.report(fast).graphs == 4
    torch._dynamo.reset()
    assert sqnr(reference(rows()), fast(rows())) > 30, "after a reset of Dynamo"


def test_another_compilation_of_the_model_uses_the_codes() -> None:
    reference = block()
    model, _ = released()
    assert sqnr(reference(rows()), compiled(model, lowering="aot_eager")(rows())) > 30


def test_other_options_that_need_the_weight_are_refused() -> None:
    model, _ = released()
    with pytest.raises(Exception, match="cannot be packed again with other options") as caught:
        compiled(model, scheme="w4a8o16")(rows())
    assert "MixqError" in repr(caught.value) or isinstance(caught.value, MixqError) or caught.value.__cause__
    with pytest.raises(Exception, match="up_proj would be left alone now"):
        compiled(model, ignore=["up_proj"])(rows())


def test_a_fallback_never_reads_a_freed_weight() -> None:
    model, _ = released()
    with pytest.raises(Exception, match="cannot be packed again with other options"):
        compiled(model, scheme="w4a8o16", on_error="fallback")(rows())


def test_tied_weights_are_never_freed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(FEATURES, FEATURES, bias=False)
            self.other = nn.Linear(FEATURES, FEATURES, bias=False)
            self.other.weight = self.one.weight
            self.alone = nn.Linear(FEATURES, FEATURES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.alone(self.other(torch.relu(self.one(x))))

    torch.manual_seed(0)
    model = Tied().eval().requires_grad_(False)
    fast = compiled(model, release_weights=True)
    fast(rows())
    assert not STORE.is_released(model.one.weight)
    assert STORE.is_released(model.alone.weight)
    assert sqnr(model.one(rows()), model.other(rows())) > 100


def test_a_weight_that_another_graph_reads_otherwise_is_not_lost() -> None:
    """The second graph reads the weight as it is: freeing it after the first would leave it garbage."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(FEATURES, FEATURES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            torch._dynamo.graph_break()
            return x + self.linear.weight.sum(dim=0)

    model = Twice().eval().requires_grad_(False)
    fast = compiled(model, release_weights=True, fullgraph=False)
    with pytest.raises(Exception, match=r"this graph reads .*weight.*, which .* freed after another graph"):
        fast(rows())


def test_a_graph_compiled_before_says_so_or_uses_the_codes() -> None:
    """Without release_weights, outlier columns are fetched from the 16-bit weight.

    Which of the two happens depends on whether this torch compiles again for the freed parameter.
    """
    reference, model = block(), block()
    first = compiled(model)
    first(rows())
    released(model)
    x = rows(columns=(3,), size=300.0)
    found: object
    try:
        found = first(x)
    except ReleasedWeightError as error:
        found = str(error)
    if isinstance(found, str):
        assert re.search(r"this graph reads .*up_proj.*weight", found)
    else:
        assert sqnr(reference(x), found) > 30


def test_static_columns_keep_their_16_bit_weights() -> None:
    stats = statistics({"up_proj": {3: 12.0}})
    reference = block()
    model, fast = released(scheme="w4a8o16", miss="static", stats=stats, ignore=["lm_head", "down_proj"])
    x = rows(columns=(3,), size=300.0)
    assert sqnr(reference(x), fast(x)) > 25
    (linear,) = mixq.report(fast).quantized
    assert linear.outlier_weight_source == "original"
    packed = next(iter(STORE._entry(model.up_proj.weight).packed.values()))
    assert torch.equal(packed.outlier_weight[:, 0], reference.up_proj.weight[:, 3])


def test_memory_in_the_report() -> None:
    _, fast = released()
    report = mixq.report(fast)
    for linear in report.quantized:
        assert linear.bytes_before == 4 * linear.out_features * linear.in_features
        assert linear.bytes_after < 0.6 * linear.bytes_before
    assert "of originals kept" not in str(report)
