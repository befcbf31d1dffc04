"""`torch.compile(model, backend="mixq")`: what it compiles, shares, refuses and says."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from compiling import FEATURES, QUICK, Block, block, compiled, rows
from linear_models import statistics
from rewriting import sqnr
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import MixqError
from mixq_compile.runtime.compilation import compilations_of
from mixq_compile.runtime.weight_store import STORE


def columns_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {linear.fqn: linear.outlier_columns for linear in mixq.report(model).quantized}


def test_it_is_found_by_name_without_an_import() -> None:
    code = (
        "import torch; assert 'mixq' in torch._dynamo.list_backends();"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval();"
        "fast = torch.compile(model, backend='mixq', options={'force': True, 'lowering': 'eager'});"
        "x = torch.randn(4, 64);"
        "error = (fast(x) - model(x)).norm() / model(x).norm();"
        "assert 0 < error < 0.05, error"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_computes_nearly_the_same(lowering: str, dtype: torch.dtype) -> None:
    model, x = block(dtype=dtype), rows(columns=(3, 40)).to(dtype)
    result = compiled(model, lowering=lowering)(x)
    assert result.dtype == dtype
    assert sqnr(model(x), result) > 30


def test_all_lowerings_give_the_same_bits() -> None:
    model, x = block(), rows(columns=(3,))
    results = []
    for lowering in ("eager", "aot_eager"):
        mixq.reset(model)
        results.append(compiled(model, lowering=lowering)(x))
    assert torch.equal(*results)


class TestGradients:
    def test_a_plain_call_of_a_model_with_trainable_weights_works_and_warns_once(self) -> None:
        model = block().requires_grad_(True)
        fast = compiled(model)
        with pytest.warns(UserWarning, match="trainable weights and gradients are on"):
            result = fast(rows())
        assert not result.requires_grad
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(rows())
            compiled(block().requires_grad_(True))(rows())

    def test_without_gradients_nothing_is_said(self) -> None:
        model = block().requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with torch.no_grad():
                compiled(model)(rows())
            with torch.inference_mode():
                compiled(model)(rows())

    @pytest.mark.parametrize("when", ["first call", "later call"])
    def test_an_input_that_requires_grad_is_refused(self, when: str) -> None:
        fast = compiled(block())
        if when == "later call":
            fast(rows())
        with pytest.raises(MixqError, match="requires grad, and a quantized graph has no gradient"):
            fast(rows().requires_grad_())

    def test_an_input_that_requires_grad_is_fine_without_gradients(self) -> None:
        with torch.no_grad():
            compiled(block())(rows().requires_grad_())


class TestMessages:
    def test_a_model_without_linears_warns(self) -> None:
        with pytest.warns(UserWarning, match="found no linear in a graph"):
            compiled(nn.Sequential(nn.LayerNorm(FEATURES)).eval())(rows())

    def test_nothing_quantized_warns_with_the_reasons(self) -> None:
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 8, dtype=torch.float32)).eval()
        with pytest.warns(
            UserWarning, match=r"none of the 2 linears of a graph: too small: \(8, 64\).*; too small"
        ):
            compiled(model.requires_grad_(False))(rows())

    def test_a_model_that_is_quantized_says_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(block())(rows())

    def test_freezing_by_inductor_is_warned_about(self) -> None:
        import torch._inductor.config as inductor_config

        message = "freezing bakes packed weights into the compiled code"
        with inductor_config.patch(freezing=True), pytest.warns(UserWarning, match=message):
            compiled(block())(rows())

    def test_a_kernel_that_cannot_run_here_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if torch.cuda.is_available():
            pytest.skip("the Triton kernels can run here")
        with pytest.raises(Exception, match=r"kernel 'tl' cannot run mixq::\w+ on cpu: .*GPU"):
            compiled(block(), kernel="tl")(rows())

    def test_statistics_of_another_model_are_refused(self) -> None:
        with pytest.raises(Exception, match="the statistics belong to another model"):
            compiled(block(), stats=statistics({"encoder.fc1": {}}))(rows())


class TestFallback:
    BROKEN = "strip-guards,canonicalize-linear,select-scheme{force=true default=w8a8o61}"
    HALF = (
        "canonicalize-linear,select-scheme{force=true},rewrite-mixed-linear,share-quantize,"
        "select-kernels{kernel=tl}"
    )

    def test_without_it_a_failing_pass_raises(self) -> None:
        with pytest.raises(Exception, match="unknown scheme 'w8a8o61'"):
            compiled(block(), pipeline=self.BROKEN)(rows())

    @pytest.mark.parametrize("pipeline", [BROKEN, HALF], ids=["before", "midway"])
    @pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
    def test_with_it_the_graph_runs_as_captured_and_says_so(
        self, pipeline: str, lowering: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        if torch.cuda.is_available() and pipeline == self.HALF:
            pytest.skip("the Triton kernels can run here")
        model, x = block(), rows(columns=(3,))
        fast = compiled(model, pipeline=pipeline, kernel="auto", on_error="fallback", lowering=lowering)
        with caplog.at_level(logging.ERROR):
            result = fast(x)
        assert torch.equal(result, model(x)), "the graph was half rewritten"
        assert "this graph is compiled unquantized" in caplog.text
        with pytest.warns(UserWarning, match="mixq has seen no linear"):
            report = mixq.report(fast)
        assert len(report.fallbacks) == 1
        assert "a graph was compiled unquantized: PassError" in str(report)


class TestRecompilation:
    """A recompilation neither packs again nor starts cold."""

    @pytest.fixture
    def packings(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Every weight that is packed."""
        from mixq_compile.runtime.stored_weight import StoredWeight

        seen: list[Any] = []
        original = StoredWeight.solve

        def counting(key: Any, weight: Tensor, statistics: Any) -> Any:
            seen.append(weight.shape)
            return original(key, weight, statistics)

        monkeypatch.setattr(StoredWeight, "solve", staticmethod(counting))
        return seen

    @pytest.mark.parametrize("dynamic", [None, False])
    def test_changing_batches_pack_once_and_stay_warm(
        self, packings: list[Any], dynamic: bool | None
    ) -> None:
        model = block()
        fast = compiled(model, dynamic=dynamic)
        fast(rows(6, columns=(3,)))
        codes = [STORE.codes(weight) for weight in model.parameters()]
        for count in (9, 1, 30):
            assert sqnr(model(rows(count)), fast(rows(count))) > 30
        assert mixq.report(fast).graphs > 1
        assert len(packings) == 2
        now = [STORE.codes(weight) for weight in model.parameters()]
        assert all(
            a is b for one, other in zip(codes, now, strict=True) for a, b in zip(one, other, strict=True)
        )
        assert columns_of(fast)["up_proj"] == (3,), "a later graph started cold"

    def test_another_gradient_mode_packs_nothing(self, packings: list[Any]) -> None:
        model = block()
        fast = compiled(model)
        with torch.no_grad():
            fast(rows(columns=(3,)))
        with torch.inference_mode():
            fast(rows())
        fast(rows())
        assert len(packings) == 2
        assert columns_of(fast)["up_proj"] == (3,)

    def test_two_compilations_of_one_model_share_codes_and_state(self, packings: list[Any]) -> None:
        model = block()
        compiled(model)(rows(columns=(3,)))
        second = compiled(model, lowering="aot_eager")
        second(rows())
        assert len(packings) == 2
        assert columns_of(model)["up_proj"] == (3,)

    def test_other_capacities_and_dtypes_share_the_codes(self, packings: list[Any]) -> None:
        model = block()
        compiled(model)(rows())
        compiled(model, capacity=32)(rows())
        assert len(packings) == 2
        assert len(STORE.codes(model.up_proj.weight)) == 1
        compiled(model, layers={"up_proj": "w4a8o16"})(rows())
        assert len(packings) == 3, "another format needs codes of its own"

    def test_dynamic_shapes_compile_once(self, packings: list[Any]) -> None:
        model = block()
        fast = compiled(model, dynamic=True)
        for count in (6, 9, 30, 17):
            assert sqnr(model(rows(count)), fast(rows(count))) > 30
        assert mixq.report(fast).graphs == 1

    def test_an_encoder_with_changing_batch_and_length(self) -> None:
        layer = nn.TransformerEncoderLayer(FEATURES, 4, 128, batch_first=True, dropout=0.0)
        model = nn.Sequential(layer, nn.Linear(FEATURES, 32)).eval().requires_grad_(False)
        fast = compiled(model, dynamic=True)
        for batch, length in ((2, 5), (3, 9), (4, 16)):
            x = torch.randn(batch, length, FEATURES, generator=torch.Generator().manual_seed(batch))
            assert sqnr(model(x), fast(x)) > 30
        assert mixq.report(fast).graphs == 1


class TestWrittenWeights:
    @pytest.mark.parametrize("miss", ["exact", "static"])
    def test_load_state_dict_packs_again_in_place(self, miss: str) -> None:
        """Under `static` no operator refreshes anything later: the outlier weights must follow at once."""
        model = block()
        stats = statistics({"up_proj": {3: 12.0}, "lm_head": {}}) if miss == "static" else None
        fast = compiled(model, miss=miss, stats=stats, ignore=["lm_head", "down_proj"])
        x = rows(columns=(3,))
        fast(x)
        (codes,) = STORE.codes(model.up_proj.weight)
        address = codes.weight_codes.data_ptr()
        torch.manual_seed(7)
        model.load_state_dict(Block().state_dict())
        assert sqnr(model(x), fast(x)) > 30
        assert STORE.codes(model.up_proj.weight) == [codes]
        assert codes.weight_codes.data_ptr() == address, "a captured graph would read the old address"
        assert mixq.report(fast).graphs == 1

    def test_writes_in_place_and_new_storage_are_seen(self) -> None:
        model, x = block(), rows()
        fast = compiled(model)
        fast(x)
        with torch.no_grad():
            model.up_proj.weight.mul_(-1.0)
        assert sqnr(model(x), fast(x)) > 30
        model.up_proj.weight.data = torch.randn_like(model.up_proj.weight)
        assert sqnr(model(x), fast(x)) > 30

    def test_a_change_of_dtype_packs_the_new_numbers(self) -> None:
        model = block()
        fast = compiled(model)
        fast(rows(columns=(3,)))
        model.to(torch.bfloat16)
        x = rows(columns=(3,)).bfloat16()
        assert sqnr(model(x), fast(x)) > 30
        (codes,) = STORE.codes(model.up_proj.weight)
        assert torch.equal(codes.weight_scale, model.up_proj.weight.float().abs().amax(dim=1) / 127)

    def test_a_copied_model_has_packed_weights_of_its_own(self) -> None:
        model = block()
        compiled(model)(rows(columns=(3,)))
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.up_proj.weight.mul_(2.0)
        assert sqnr(other(rows()), compiled(other)(rows())) > 30
        assert columns_of(other)["up_proj"] == ()
        assert columns_of(model)["up_proj"] == (3,)


def test_entries_die_with_their_model() -> None:
    import gc

    model = block()
    compiled(model)(rows())
    gc.collect()  # models of earlier tests
    before = len(STORE._entries)
    weights = len([weight for weight in model.parameters() if STORE.codes(weight)])
    torch._dynamo.reset()
    del model
    gc.collect()
    assert len(STORE._entries) == before - weights == before - 2


def test_several_graphs_of_one_model_are_all_quantized() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, FEATURES)
            self.second = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Broken().eval().requires_grad_(False)
    fast = compiled(model, fullgraph=False)
    assert sqnr(model(rows()), fast(rows())) > 30
    report = mixq.report(fast)
    assert report.graphs == 2
    assert [linear.fqn for linear in report.quantized] == ["first", "second"]


def test_a_function_over_a_module_is_compiled_too() -> None:
    model = block()

    def pooled(x: Tensor) -> Tensor:
        return model(x).mean(dim=0)

    assert sqnr(pooled(rows()), compiled(pooled)(rows())) > 25
    assert len(mixq.report(model).quantized) == 2


def test_a_tied_output_head_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, FEATURES)
            self.up_proj = nn.Linear(FEATURES, FEATURES)
            self.score = nn.Linear(FEATURES, 50, bias=False)
            self.score.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.score(self.up_proj(self.embed(ids)))

    model = Tied().eval().requires_grad_(False)
    fast = compiled(model)
    ids = torch.arange(8)
    assert sqnr(model(ids), fast(ids)) > 30
    report = mixq.report(fast)
    assert [linear.fqn for linear in report.quantized] == ["up_proj"]
    assert {linear.fqn: linear.skip for linear in report.skipped} == {
        "score": "its weight is tied to an embedding"
    }


def test_a_buffer_that_is_new_in_every_call_does_not_compile_again() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(FEATURES, FEATURES)
            self.register_buffer("total", torch.zeros(FEATURES))

        def forward(self, x: Tensor) -> Tensor:
            self.total = self.total + x.sum(dim=0)
            return self.up_proj(x)

    model = Counting().eval().requires_grad_(False)
    fast = compiled(model)
    for _ in range(4):
        fast(rows())
    torch.testing.assert_close(model.total, 4 * rows().sum(dim=0))
    assert mixq.report(model).graphs == 1


def test_one_graph_of_a_swapped_model_serves_every_batch() -> None:
    model = mixq.quantize(block())
    fast = compiled(model, dynamic=True)
    for count in (6, 9, 30):
        assert sqnr(model(rows(count)), fast(rows(count))) > 60
    assert len(compilations_of(model.buffers())) == 1


class TestState:
    def test_reset_forgets_and_equal_calls_give_equal_bits(self) -> None:
        model = block()
        fast = compiled(model)
        first = fast(rows(columns=(3,)))
        fast(rows(columns=(20,), seed=5))
        assert columns_of(fast)["up_proj"] == (3, 20)
        mixq.reset(fast)
        assert columns_of(fast)["up_proj"] == ()
        assert torch.equal(fast(rows(columns=(3,))), first)

    def test_freeze_keeps_the_columns_known_now(self) -> None:
        model = block()
        fast = compiled(model)
        fast(rows(columns=(3,)))
        mixq.freeze(fast)
        before = fast(rows())
        fast(rows(columns=(20,)))
        assert columns_of(fast)["up_proj"] == (3,)
        assert torch.equal(fast(rows()), before), "traffic changed a frozen model"

    def test_an_outlier_of_a_later_call_is_found_in_that_call(self) -> None:
        model = block()
        fast = compiled(model)
        fast(rows())
        x = rows(columns=(3, 40), size=300.0)
        assert sqnr(model(x), fast(x)) > 30
        assert columns_of(fast)["up_proj"] == (3, 40)

    def test_static_columns_do_not_depend_on_traffic(self) -> None:
        stats = statistics({"up_proj": {3: 12.0}})
        fast = compiled(block(), miss="static", stats=stats, ignore=["lm_head", "down_proj"])
        before = fast(rows())
        fast(rows(columns=(20,)))
        assert torch.equal(fast(rows()), before)
        assert columns_of(fast) == {"up_proj": (3,)}

    def test_static_rows_do_not_depend_on_the_batch(self) -> None:
        stats = statistics({"0": {3: 12.0}})
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES)).eval().requires_grad_(False)
        fast = compiled(model, batch_invariant=True, dynamic=True, miss="static", stats=stats)
        many = rows(40, columns=(3,))
        assert torch.equal(fast(many)[5:9], fast(many[5:9].clone()))


def test_options_of_the_quick_helper_are_valid() -> None:
    assert QUICK["kernel"] == "ref"
