"""`capture` and `compile`: the ahead-of-time route over torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import FEATURES, Block, block, rows
from linear_models import statistics
from rewriting import sqnr
from tiny_llama import ids, logits, tiny_llama
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import mixq_compile as mixq
from mixq_compile.errors import MixqError, OptionError


def compile_block(**options: Any) -> tuple[ExportedProgram, Any]:
    program = mixq.capture(block(), rows(), dynamic_shapes=({0: Dim.DYNAMIC},))
    return mixq.compile(program, force=True, **options)


def operators(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_a_program_computes_nearly_the_same() -> None:
    program, history = compile_block()
    x = rows(columns=(3,))
    assert sqnr(block()(x), program.module()(x)) > 30
    assert "mixq.mixed_linear.default" in operators(program)
    assert [record.spec.split("{")[0] for record in history.records][-1] == "verify"


def test_16_bit_weights_are_gone() -> None:
    program, _ = compile_block()
    names = set(program.state_dict)
    assert "up_proj.weight" not in names
    assert {"lm_head.weight", "up_proj.bias"} <= names
    before = sum(tensor.nbytes for tensor in mixq.capture(block(), rows()).state_dict.values())
    assert sum(tensor.nbytes for tensor in program.state_dict.values()) < 0.6 * before


def test_the_captured_program_is_left_as_it_was() -> None:
    program = mixq.capture(block(), rows())
    nodes = [str(node) for node in program.graph.nodes]
    mixq.compile(program, force=True)
    assert [str(node) for node in program.graph.nodes] == nodes
    assert torch.equal(program.module()(rows()), block()(rows()))


@pytest.mark.parametrize("count", [2, 6, 33])
def test_dynamic_sizes_stay_dynamic(count: int) -> None:
    program, _ = compile_block()
    assert sqnr(block()(rows(count)), program.module()(rows(count))) > 30


def test_fixed_sizes_stay_fixed() -> None:
    program, _ = mixq.compile(mixq.capture(block(), rows()), force=True)
    assert not program.range_constraints
    with pytest.raises(Exception, match=r"equal to 6|== 6"):
        program.module()(rows(7))


class Several(nn.Module):
    """Positional and named inputs, some of them in containers, one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, 32)

    def forward(self, pair: list[Tensor], scale: float, *, more: dict[str, Tensor], bias: Tensor) -> Tensor:
        return self.linear(pair[0] + pair[1] * scale) + more["offset"] + bias


def test_dynamic_sizes_of_nested_and_named_inputs() -> None:
    torch.manual_seed(0)
    model = Several().eval()
    batch = {0: Dim.DYNAMIC}

    def example(count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = ([rows(count), rows(count, seed=2)], 0.5)
        return args, {"more": {"offset": torch.ones(count, 32)}, "bias": torch.ones(32)}

    args, kwargs = example(6)
    shapes = {"pair": [batch, batch], "scale": None, "more": {"offset": batch}, "bias": None}
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    compiled, _ = mixq.compile(program, force=True)
    args, kwargs = example(9)
    assert sqnr(model(*args, **kwargs).detach(), compiled.module()(*args, **kwargs)) > 30


def test_columns_are_learned_by_the_program_too() -> None:
    program, _ = compile_block()
    module = program.module()
    x = rows(columns=(3, 40), size=300.0)
    assert sqnr(block()(x), module(x)) > 30
    index = next(t for name, t in module.named_buffers() if name.endswith("up_proj_weight_index"))
    assert index[:2].tolist() == [3, 40]


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    program, _ = compile_block()
    x = rows(columns=(3,))
    expected = program.module()(x)
    torch.export.save(program, tmp_path / "block.pt2")
    program, _ = compile_block()
    loaded = torch.export.load(tmp_path / "block.pt2")
    assert torch.equal(loaded.module()(x), expected)


def test_a_program_can_be_compiled_further() -> None:
    program, _ = compile_block()
    fast = torch.compile(program.module(), backend="aot_eager", dynamic=True)
    assert sqnr(block()(rows(9)), fast(rows(9))) > 30


def test_calibrated_columns_are_used() -> None:
    stats = statistics({"up_proj": {3: 12.0}})
    program, _ = compile_block(stats=stats, miss="static", ignore=["lm_head", "down_proj"])
    assert "mixq.quantize.default" in operators(program)
    x = rows(columns=(3,), size=300.0)
    assert sqnr(block()(x), program.module()(x)) > 30


def test_a_pipeline_of_the_users_own() -> None:
    program = mixq.capture(block(), rows())
    text = (
        "canonicalize-linear,select-scheme{default=w8a16 force=true},rewrite-mixed-linear,prune-dead-weights"
    )
    compiled, history = mixq.compile(program, text)
    assert "mixq.weight_only_linear.default" in operators(compiled)
    assert history.pipeline.startswith("canonicalize-linear,select-scheme{default=w8a16")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_swapped_model_takes_its_own_pipeline(dynamic: bool) -> None:
    model = mixq.quantize(block())
    expected = model(rows(columns=(3,)))
    mixq.reset(model)
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    program, history = mixq.compile(mixq.capture(model, rows(), dynamic_shapes=shapes))
    assert "expand-linear" in history.pipeline
    assert "mixq.linear.default" not in operators(program)
    torch.testing.assert_close(program.module()(rows(columns=(3,))), expected, rtol=1e-5, atol=1e-5)


def test_a_transformers_model() -> None:
    model = tiny_llama()
    program = mixq.capture(model, {"input_ids": ids(), "use_cache": False})
    compiled, history = mixq.compile(program, "aot", force=True)
    found = compiled.module()(input_ids=ids(), use_cache=False).logits
    assert sqnr(logits(model, ids()), found) > 28
    chosen = [d for d in history.decisions() if d.reason == "scheme w8a8o16"]
    assert len(chosen) == 14


class TestCapture:
    def test_examples_of_every_kind(self) -> None:
        model = block()
        for example in (rows(), (rows(),), [rows()], {"x": rows()}):
            assert isinstance(mixq.capture(model, example), ExportedProgram)

    def test_training_flags_of_every_module_are_restored(self) -> None:
        model = nn.Sequential(
            nn.Linear(FEATURES, FEATURES), nn.Dropout(0.5), nn.BatchNorm1d(FEATURES)
        ).train()
        model[2].eval()
        program = mixq.capture(model, rows())
        assert [module.training for module in model] == [True, True, False]
        assert model.training
        assert torch.equal(program.module()(rows()), program.module()(rows())), (
            "dropout was captured in training"
        )

    def test_flags_are_restored_after_a_failure(self) -> None:
        model = block().train()
        with pytest.raises(Exception, match=r"shape|size|dim"):
            mixq.capture(model, torch.randn(3, 5))
        assert model.training

    def test_an_argument_that_forward_does_not_take(self) -> None:
        with pytest.raises(OptionError, match="the model's forward takes no argument 'y': it has x"):
            mixq.capture(block(), {"y": rows()})

    def test_keyword_arguments_of_any_name_where_forward_takes_them(self) -> None:
        class Open(Block):
            def forward(self, x: Tensor, **extra: Tensor) -> Tensor:
                return super().forward(x + extra["offset"])

        program = mixq.capture(Open().eval(), {"x": rows(), "offset": rows(seed=2)})
        assert isinstance(program, ExportedProgram)


class TestErrors:
    def test_a_module_instead_of_a_program(self) -> None:
        with pytest.raises(OptionError, match=r"mixq_compile\.capture\(model, example\) makes one"):
            mixq.compile(block())  # type: ignore[arg-type]

    def test_an_unknown_option(self) -> None:
        with pytest.raises(OptionError, match="Did you mean 'threshold'"):
            mixq.compile(mixq.capture(block(), rows()), treshold=3.0)

    def test_an_unknown_pipeline(self) -> None:
        with pytest.raises(OptionError, match="unknown pass 'aott'"):
            mixq.compile(mixq.capture(block(), rows()), "aott")

    def test_four_bits_without_calibration(self) -> None:
        with pytest.raises(OptionError, match="which an export implies"):
            mixq.compile(mixq.capture(block(), rows()), scheme="w4a8o16")

    def test_a_program_without_example_inputs(self) -> None:
        program = mixq.capture(block(), rows())
        program._example_inputs = None
        with pytest.raises(MixqError, match="pass example="):
            mixq.compile(program, force=True)
        compiled, _ = mixq.compile(program, force=True, example=rows())
        assert sqnr(block()(rows()), compiled.module()(rows())) > 30
