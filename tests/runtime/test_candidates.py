"""Programs rewritten with limited fuel, and the verdicts on them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from compiling import block, rows
from throwaway_passes import REGISTRY
from torch import Tensor
from torch.export import Dim

import mixq_compile as mixq
from mixq_compile.errors import MixqError, OptionError
from mixq_compile.evaluation import sqnr
from mixq_compile.pipeline import Fuel, PassContext, Pipeline
from mixq_compile.runtime.candidates import (
    ByCheck,
    BySqnr,
    Candidate,
    Example,
    Verdict,
    judged,
    rewrite,
    unrewritten,
)
from mixq_compile.runtime.weight_store import WeightStore

QUANTIZED = "canonicalize-linear,select-scheme{force=true kernel=ref},rewrite-mixed-linear{kernel=ref}"


def block_example(count: int = 6, columns: tuple[int, ...] = (), dynamic: bool = False) -> Example:
    x = rows(count, columns=columns)
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    return Example(mixq.capture(block(), x, dynamic_shapes=shapes), (x,), {})


@pytest.fixture(scope="module")
def example() -> Example:
    return block_example()


def quantized(example: Example, fuel: int | None = None, text: str = QUANTIZED) -> Candidate:
    context = PassContext(weights=WeightStore(), fuel=Fuel(fuel))
    return rewrite(example.program, Pipeline.parse(text), context)


def by_sqnr(example: Example, least: float) -> BySqnr:
    return BySqnr(example, unrewritten(example.program).outputs(example), least, sqnr)


class TestCandidates:
    def test_fuel_limits_the_rewrites(self, example: Example) -> None:
        assert quantized(example).spent > 3
        assert quantized(example, fuel=3).spent == 3

    def test_without_fuel_nothing_changes(self, example: Example) -> None:
        (expected,) = unrewritten(example.program).outputs(example)
        (output,) = quantized(example, fuel=0).outputs(example)
        assert torch.equal(output, expected)
        assert torch.equal(output, block()(*example.args))

    def test_the_program_is_left_as_it_was(self, example: Example) -> None:
        before = str(example.program.graph)
        quantized(example).outputs(example)
        assert str(example.program.graph) == before

    def test_columns_that_one_run_learns_are_not_known_to_the_next(self) -> None:
        model = mixq.quantize(block())
        mixq.reset(model)
        x = rows(columns=(3, 40), size=300.0)
        example = Example(mixq.capture(model, rows()), (x,), {})
        before = {name: tensor.clone() for name, tensor in example.program.state_dict.items()}
        quantized(example, text="swapped").outputs(example)
        assert all(torch.equal(tensor, before[name]) for name, tensor in example.program.state_dict.items())

    def test_a_failing_pass_is_a_result(self, example: Example) -> None:
        pipeline = Pipeline.parse("annotate-linears,fail-at-second", REGISTRY)
        failed = rewrite(example.program, pipeline, PassContext())
        assert failed.spent == 2
        assert len(failed.history.records) == 2
        verdict = judged(failed, by_sqnr(example, -math.inf))
        assert verdict == Verdict(False, "pass 2, fail-at-second, failed")

    def test_outputs_are_the_floating_point_tensors_in_any_container(self) -> None:
        class Several(torch.nn.Module):
            def forward(self, x: Tensor) -> dict[str, object]:
                return {"index": x.argmax(-1), "pair": (x + 1, [x + 2]), "none": None, "empty": x[:0]}

        x = torch.zeros(2, 2)
        example = Example(mixq.capture(Several(), x), (x,), {})
        outputs = unrewritten(example.program).outputs(example)
        assert [float(output.mean()) for output in outputs] == [1, 2]

    def test_a_saved_candidate_keeps_dynamic_sizes(self, tmp_path: Path) -> None:
        example = block_example(dynamic=True)
        quantized(example).save(tmp_path / "candidate.pt2", example)
        module = torch.export.load(tmp_path / "candidate.pt2").module()
        assert sqnr(block()(rows(9)), module(rows(9))) > 30


class TestBySqnr:
    def test_enough_decibels_are_good(self, example: Example) -> None:
        verdict = judged(quantized(example), by_sqnr(example, 20))
        assert verdict.good
        assert verdict.sqnr_db is not None
        assert 20 < verdict.sqnr_db < 100
        assert verdict.reason == f"SQNR {verdict.sqnr_db:.1f} dB"

    def test_too_few_are_bad(self, example: Example) -> None:
        assert not judged(quantized(example), by_sqnr(example, 100)).good

    def test_nothing_rewritten_is_exact(self, example: Example) -> None:
        assert judged(unrewritten(example.program), by_sqnr(example, 1000)).sqnr_db == math.inf

    def test_the_worst_output_counts_and_a_nan_is_the_worst(self, example: Example) -> None:
        candidate = unrewritten(example.program)
        (output,) = candidate.outputs(example)

        class Several(Candidate):
            def outputs(self, example: Example) -> list[Tensor]:
                return [output, output + 1, output * math.nan, output]

        several = Several(candidate.graph, 0, candidate.history, None)
        assert not judged(several, BySqnr(example, [output] * 4, -1000, sqnr)).good

    def test_other_shapes_are_bad(self, example: Example) -> None:
        judge = BySqnr(example, [torch.zeros(1)], -math.inf, sqnr)
        assert judged(quantized(example), judge) == Verdict(False, "it returns tensors of other shapes")


class TestByCheck:
    @pytest.mark.parametrize(("code", "good"), [(0, True), (1, False), (77, False)])
    def test_exit_code_0_is_good(self, example: Example, code: int, good: bool) -> None:
        verdict = judged(quantized(example), ByCheck(example, f"echo seen; exit {code}"))
        assert (verdict.good, verdict.reason, verdict.output) == (good, f"exit code {code}", "seen\n")

    def test_the_candidate_is_named_in_two_ways(self, example: Example) -> None:
        judge = ByCheck(example, 'test -s {} && test {} = "$MIXQ_CANDIDATE" && echo {}')
        verdict = judged(quantized(example), judge)
        assert verdict.good
        assert not Path(verdict.output.strip()).exists()

    def test_exit_code_125_cannot_tell(self, example: Example) -> None:
        with pytest.raises(MixqError, match=r"cannot tell .* It said: no data"):
            judged(quantized(example), ByCheck(example, "echo no data; exit 125"))

    def test_a_command_that_does_not_exist(self, example: Example) -> None:
        with pytest.raises(OptionError, match="cannot run the check 'pythno'"):
            judged(quantized(example), ByCheck(example, "pythno"))

    def test_runs_in_the_folder_that_it_is_given(self, example: Example, tmp_path: Path) -> None:
        (tmp_path / "check.py").write_text("print('found')")
        verdict = judged(quantized(example), ByCheck(example, f"{sys.executable} check.py", tmp_path))
        assert verdict.output == "found\n"


class TestFailures:
    def test_a_judge_that_fails_is_a_verdict(self, example: Example) -> None:
        def judge(candidate: Candidate) -> Verdict:
            raise RuntimeError("no such kernel\nmore of it")

        assert judged(quantized(example), judge) == Verdict(False, "RuntimeError: no such kernel")
