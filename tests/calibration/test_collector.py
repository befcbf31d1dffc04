"""`calibrate`: what it observes, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shared_data import minilm_folder, stories260k
from torch import Tensor, nn

from mixq_compile.calibration import calibrate, linear_shapes
from mixq_compile.errors import MixqError, OptionError, StatisticsError


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(torch.relu(self.first(x * scale)))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def random_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


class TestWhatIsMeasured:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_statistics_equal_those_of_all_rows_together_in_float64(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
        batches = [random_rows(5, 6, dtype=dtype), 9 * random_rows(2, 3, 6, dtype=dtype)]
        entry = calibrate(model, batches, thresholds=(6.0, 1.0))["0"]

        rows = torch.cat([batch.reshape(-1, 6) for batch in batches]).double()
        assert entry.rows == 11
        assert entry.nonfinite_rows == 0
        assert torch.equal(entry.absmax, rows.abs().amax(dim=0).float())
        torch.testing.assert_close(entry.mean_magnitude, rows.abs().mean(dim=0).float())
        torch.testing.assert_close(entry.mean_square, rows.square().mean(dim=0).float())
        expected = torch.stack([(rows.abs() > 6).sum(dim=0), (rows.abs() > 1).sum(dim=0)])
        assert torch.equal(entry.rows_above, expected)

    def test_each_linear_sees_its_own_input(self) -> None:
        model = TwoLayers()
        x = random_rows(7, 6)
        stats = calibrate(model, [x])
        hidden = torch.relu(model.first(x)).detach()
        assert list(stats) == ["first", "second"]
        assert torch.equal(stats["first"].absmax, x.abs().amax(dim=0))
        assert torch.equal(stats["second"].absmax, hidden.abs().amax(dim=0))

    def test_the_metadata_describe_the_run(self) -> None:
        stats = calibrate(TwoLayers(), [random_rows(7, 6), random_rows(2, 6)], thresholds=(5.0,))
        assert stats.model_class.endswith("TwoLayers")
        assert stats.dtype == "float32"
        assert stats.total_rows == 9
        assert stats.thresholds == (5.0,)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_rows_that_are_not_finite_are_counted_and_left_out(self, bad: float) -> None:
        x = random_rows(5, 6)
        x[3, 2] = bad
        with pytest.warns(UserWarning, match="NaN or infinity reached 0"):
            entry = calibrate(nn.Sequential(nn.Linear(6, 4)), [x])["0"]
        finite = x[[0, 1, 2, 4]]
        assert (entry.rows, entry.nonfinite_rows) == (4, 1)
        assert torch.equal(entry.absmax, finite.abs().amax(dim=0))
        torch.testing.assert_close(entry.mean_square, finite.square().mean(dim=0))

    def test_the_model_s_tensors_are_not_changed(self) -> None:
        model, x = TwoLayers(), random_rows(7, 6)
        before, weight = x.clone(), model.first.weight.clone()
        calibrate(model, [x])
        assert torch.equal(x, before)
        assert torch.equal(model.first.weight, weight)


class TestWhichModules:
    def test_conv1d_of_transformers_is_observed_with_its_transposed_weight(self) -> None:
        from transformers.pytorch_utils import Conv1D

        model = nn.Sequential(Conv1D(3, 6))
        assert linear_shapes(model) == {"0": (3, 6)}
        assert calibrate(model, [random_rows(5, 6)])["0"].in_features == 6

    def test_subclasses_of_linear_are_not_observed(self) -> None:
        class Other(nn.Linear):
            pass

        model = nn.Sequential(Other(6, 6), nn.Linear(6, 4))
        assert list(calibrate(model, [random_rows(5, 6)])) == ["1"]

    def test_a_shared_module_has_statistics_under_each_of_its_names(self) -> None:
        layer = nn.Linear(6, 6)
        x = random_rows(5, 6)
        model = nn.Sequential(layer, layer)
        stats = calibrate(model, [x])
        assert list(stats) == ["0", "1"]
        assert torch.equal(stats["0"].absmax, stats["1"].absmax)
        assert stats["0"].rows == 10
        assert stats.check_model(linear_shapes(model)) == ()

    def test_linears_called_by_keyword_are_observed(self) -> None:
        class ByKeyword(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(input=x)

        assert calibrate(ByKeyword(), [random_rows(5, 6)])["inner"].rows == 5

    def test_a_linear_that_never_ran_is_named_in_a_warning(self) -> None:
        class Unused(TwoLayers):
            def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
                return self.first(x)

        with pytest.warns(UserWarning, match="second never ran") as caught:
            stats = calibrate(Unused(), [random_rows(5, 6)])
        assert caught[0].filename == __file__
        assert stats.never_run == ("second",)
        assert stats.find("second") is None
        with pytest.raises(StatisticsError, match="never ran"):
            stats["second"]

    def test_a_model_already_compiled_and_run_is_observed_all_the_same(self) -> None:
        compiled = torch.compile(TwoLayers(), backend="eager")
        x = random_rows(5, 6)
        with torch.no_grad():
            compiled(x)
        stats = calibrate(compiled, [x])
        assert list(stats) == ["first", "second"]
        assert stats["first"].rows == 5
        assert stats.model_class.endswith("TwoLayers")


class TestBatches:
    @pytest.mark.parametrize(
        "batch",
        [random_rows(5, 6), {"x": random_rows(5, 6)}, (random_rows(5, 6), 1.0), [random_rows(5, 6)]],
        ids=["tensor", "mapping", "tuple", "list"],
    )
    def test_tensors_mappings_and_tuples_reach_the_model(self, batch: Any) -> None:
        assert calibrate(TwoLayers(), [batch])["first"].rows == 5

    def test_a_tokenizer_s_output_reaches_a_language_model(self) -> None:
        model, tokenizer = stories260k()
        batch = tokenizer("Once upon a time, there was a cat.", return_tensors="pt")
        stats = calibrate(model, [batch])
        assert stats.total_rows == batch["input_ids"].shape[1]
        assert len(stats) == 5 * 7 + 1
        assert stats.check_model(linear_shapes(model)) == ()

    def test_limit_takes_no_further_batch_from_the_source(self) -> None:
        taken = []

        def source() -> Iterator[Tensor]:
            for number in range(10):
                taken.append(number)
                yield random_rows(2, 6)

        assert calibrate(TwoLayers(), source(), limit=3)["first"].rows == 6
        assert taken == [0, 1, 2]

    def test_the_outliers_of_a_trained_encoder_are_found(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = minilm_folder()
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        texts = ["A man is playing a guitar on stage.", "The weather is lovely today.", "It rained."]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = calibrate(model, [tokenizer(texts, padding=True, return_tensors="pt")])
        name = "encoder.layer.0.intermediate.dense"
        columns = stats.outlier_columns(name)
        assert 1 <= len(columns) <= 16
        assert stats[name].absmax.max() > 3 * stats[name].absmax.median()


class TestWhatIsRestored:
    def test_hooks_and_training_flags_after_success(self) -> None:
        model = TwoLayers().train()
        model.second.eval()
        calibrate(model, [random_rows(5, 6)])
        assert hooks(model) == 0
        assert (model.training, model.first.training, model.second.training) == (True, True, False)

    def test_hooks_and_training_flags_after_the_model_failed(self) -> None:
        model = TwoLayers().train()
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            calibrate(model, [random_rows(5, 7)])
        assert hooks(model) == 0
        assert model.training

    def test_the_model_runs_in_eval_mode_without_gradients(self) -> None:
        seen = []

        class Watching(TwoLayers):
            def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
                seen.append((self.training, torch.is_grad_enabled()))
                return super().forward(x, scale)

        calibrate(Watching().train(), [random_rows(5, 6)])
        assert seen == [(False, False)]


class TestErrors:
    def test_no_batches(self) -> None:
        with pytest.raises(MixqError, match="no batches"):
            calibrate(TwoLayers(), [])

    def test_no_linears(self) -> None:
        with pytest.raises(MixqError, match=r"no nn\.Linear"):
            calibrate(nn.Sequential(nn.ReLU()), [random_rows(5, 6)])

    def test_a_model_on_the_meta_device(self) -> None:
        with pytest.raises(MixqError, match=r"first\.weight.*meta device"):
            calibrate(TwoLayers().to("meta"), [random_rows(5, 6)])

    def test_text_that_was_not_tokenized(self) -> None:
        with pytest.raises(OptionError, match="Tokenize text first"):
            calibrate(TwoLayers(), ["Once upon a time"])

    def test_nothing_but_nan(self) -> None:
        with pytest.raises(MixqError, match="every row that reached first"):
            calibrate(TwoLayers(), [torch.full((5, 6), float("nan"))])

    def test_batches_without_rows(self) -> None:
        with pytest.raises(MixqError, match="none of the 2 linears"):
            calibrate(TwoLayers(), [torch.zeros(0, 6)])

    @pytest.mark.parametrize("limit", [0, -1, True, 1.5])
    def test_a_limit_that_is_no_positive_number(self, limit: Any) -> None:
        with pytest.raises(OptionError, match="limit"):
            calibrate(TwoLayers(), [random_rows(5, 6)], limit=limit)

    @pytest.mark.parametrize("thresholds", [(), (0.0,), (float("nan"),), (6.0, float("inf"))])
    def test_thresholds_that_are_no_positive_numbers(self, thresholds: tuple[float, ...]) -> None:
        with pytest.raises(OptionError, match="thresholds"):
            calibrate(TwoLayers(), [random_rows(5, 6)], thresholds=thresholds)


def test_nothing_is_printed_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    calibrate(TwoLayers(), [random_rows(5, 6)], progress=True)
    assert capfd.readouterr() == ("", "")


def test_calibration_and_evaluation_import_no_transformers() -> None:
    imports = "import sys, mixq_compile.calibration, mixq_compile.evaluation"
    code = f"{imports}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
