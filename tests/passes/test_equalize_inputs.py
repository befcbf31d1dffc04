"""`equalize-inputs`: linears read `x / s` and hold `W · s`; the function stays, the parameters do too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from captures import ROUTES, capture
from linear_models import ATTENTION, captured, network, rows, statistics
from rewriting import BY_MAGNITUDE, CHOSEN, NAMED, decisions, reasons, run
from small_transformers import CLASSES, difference, output, rewritten, tokens, transformer
from torch import nn

import mixq_compile as mixq
from mixq_compile.errors import OptionError, StatisticsError
from mixq_compile.ir.annotations import Annotations
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ops.operands import operand
from mixq_compile.pipeline import PassContext, PassError, Pipeline
from mixq_compile.runtime.weight_store import WeightStore

EXACT = 1e-5
aten = torch.ops.aten
STATS = {name: {3: 50.0} for name in ATTENTION}


def linears(graph: CapturedGraph) -> dict[str, torch.fx.Node]:
    return {Annotations(node).fqn or "": node for node in graph.walk(aten.linear.default)}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", CLASSES)
def test_the_function_of_a_model_is_preserved(kind: str, route: str) -> None:
    model = transformer(kind)
    before = {name: value.clone() for name, value in model.named_parameters()}
    graph, history = rewritten(model, f"{NAMED},equalize-inputs", route)
    assert any(decision.verdict == "applied" for decision in decisions(history, "equalize-inputs"))
    assert difference(graph, model) < EXACT
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), f"{name} was changed: others may read it"


def test_under_a_symbolic_batch_it_is_preserved_too() -> None:
    model = transformer("llama")
    graph, _ = rewritten(model, f"{NAMED},equalize-inputs", dynamic=True)
    assert difference(graph, model, tokens(5)) < EXACT


@pytest.mark.parametrize("route", ROUTES)
def test_linears_that_read_one_value_share_the_factors(route: str) -> None:
    graph = captured(network(), route)
    history = run(graph, f"{NAMED},equalize-inputs", stats=statistics(STATS))
    nodes = linears(graph)
    fed = {name: operand(nodes[name], "input") for name in ATTENTION}
    assert fed["attn.q_proj"] is fed["attn.k_proj"] is fed["attn.v_proj"], "three divisions of one value"
    assert fed["attn.o_proj"] is not fed["attn.q_proj"]
    told = {decision.fqn: decision for decision in decisions(history, "equalize-inputs")}
    assert told["attn.k_proj"].details == {"linears": ["attn.k_proj", "attn.v_proj", "attn.q_proj"]}
    assert told["attn.k_proj"].reason.endswith(", with v_proj, q_proj")
    assert told["attn.q_proj"].reason == "reads what attn.k_proj reads"


def test_factors_are_those_of_smoothquant() -> None:
    model, stats = network(), statistics(STATS)
    graph = captured(model, "export")
    run(graph, f"{NAMED},equalize-inputs{{alpha=0.7}}", stats=stats)
    weights = [getattr(model.attn, f"{name}_proj").weight for name in "qkv"]
    largest = torch.cat(weights).abs().amax(dim=0)
    expected = stats["attn.q_proj"].absmax ** 0.7 / largest**0.3
    node = linears(graph)["attn.q_proj"]
    inverse = graph.attribute(Annotations(node).equalized or "")
    torch.testing.assert_close(1 / inverse, expected)
    torch.testing.assert_close(graph.tensor(operand(node, "weight")), model.attn.q_proj.weight * expected)


def test_a_transposed_weight_is_scaled_along_its_rows() -> None:
    model = transformer("gpt2")
    graph, _ = rewritten(model, f"{NAMED},equalize-inputs")
    node = linears(graph)["m.transformer.h.0.attn.c_attn"]
    inverse = graph.attribute(Annotations(node).equalized or "")
    derived = graph.tensor(graph.weight_parameter(operand(node, "weight")))
    weight = model.m.transformer.h[0].attn.c_attn.weight
    assert derived is not None
    assert derived.shape == weight.shape == (64, 192)
    torch.testing.assert_close(derived, weight / inverse[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_weights_take_what_the_rounded_division_leaves(dtype: torch.dtype) -> None:
    """`1 / s` is rounded to the activation's dtype; with the unrounded s in W each channel would be off."""
    model = network().to(dtype)
    graph = captured(model, "export", rows(6).to(dtype))
    run(graph, f"{NAMED},equalize-inputs", stats=statistics(STATS))
    node = linears(graph)["attn.o_proj"]
    inverse = graph.attribute(Annotations(node).equalized or "")
    assert inverse.dtype == dtype
    expected = (model.attn.o_proj.weight.float() / inverse.float()).to(dtype)
    assert torch.equal(graph.tensor(operand(node, "weight")), expected)


def test_a_dead_channel_keeps_its_weights() -> None:
    model, stats = network(), statistics(STATS)
    stats["attn.o_proj"].absmax[5] = 0.0
    model.attn.o_proj.weight.data[:, 6] = 0.0
    graph = captured(model, "export")
    run(graph, f"{NAMED},equalize-inputs", stats=stats)
    inverse = graph.attribute(Annotations(linears(graph)["attn.o_proj"]).equalized or "")
    assert inverse[[5, 6]].tolist() == [1.0, 1.0]


class TestWhatIsLeftAlone:
    def test_values_that_only_unquantized_linears_read(self) -> None:
        graph = captured(network(), "export")
        ignoring = "select-scheme{force=true ignore=lm_head,o_proj}"
        history = run(graph, f"{NAMED},{ignoring},equalize-inputs", stats=statistics(STATS))
        found = reasons(history, "equalize-inputs")
        nothing = "skipped: none of the linears that read the value is to be quantized"
        assert found["lm_head"] == found["attn.o_proj"] == nothing
        assert found["attn.k_proj"].startswith("applied: ")

    def test_unquantized_siblings_come_along(self) -> None:
        """Else the division could not move into what makes the value."""
        graph = captured(network(), "export")
        ignoring = "select-scheme{force=true ignore=k_proj,v_proj,lm_head}"
        run(graph, f"{NAMED},{ignoring},equalize-inputs", stats=statistics(STATS))
        nodes = linears(graph)
        assert operand(nodes["attn.k_proj"], "input") is operand(nodes["attn.q_proj"], "input")

    def test_what_never_ran(self) -> None:
        stats = statistics({name: STATS[name] for name in ATTENTION if name != "attn.o_proj"})
        object.__setattr__(stats, "never_run", ("attn.o_proj",))
        history = run(captured(network(), "export"), f"{CHOSEN},equalize-inputs", stats=stats)
        assert "never ran during calibration" in reasons(history, "equalize-inputs")["attn.o_proj"]

    def test_rotated_inputs_whose_maxima_nobody_knows(self) -> None:
        graph = captured(network(), "export")
        history = run(graph, f"{CHOSEN},rotate-inputs,equalize-inputs", stats=statistics(STATS))
        assert "is rotated" in reasons(history, "equalize-inputs")["attn.k_proj"]

    def test_a_value_that_is_written_between_its_readers(self) -> None:
        class Written(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = x.clone()
                first = self.q_proj(x)
                x.add_(1.0)
                return first + self.k_proj(x)

        graph = capture(Written().eval(), rows(6), route="dynamo")
        history = run(graph, f"{CHOSEN},equalize-inputs", stats=statistics({"q_proj": {}, "k_proj": {}}))
        found = reasons(history, "equalize-inputs")
        assert "changed in place" in found["q_proj"], found


class TestErrors:
    def test_without_statistics(self) -> None:
        with pytest.raises(PassError, match="no statistics were given: pass stats=") as caught:
            run(captured(network(), "export"), f"{CHOSEN},equalize-inputs")
        assert isinstance(caught.value.__cause__, StatisticsError)

    def test_statistics_of_another_model(self) -> None:
        with pytest.raises(PassError, match="belong to another model"):
            run(
                captured(network(), "export"),
                f"{CHOSEN},equalize-inputs",
                stats=statistics({name: {} for name in ATTENTION}, features=32),
            )

    def test_without_a_store(self) -> None:
        context = PassContext(stats=statistics(STATS))
        with pytest.raises(PassError, match="equalize-inputs derives weights, and this run has no store"):
            Pipeline.parse(f"{CHOSEN},equalize-inputs").run(captured(network(), "export"), context)

    @pytest.mark.parametrize("alpha", [-0.1, 1.5])
    def test_alpha_out_of_range(self, alpha: float) -> None:
        with pytest.raises(PassError, match="alpha must be between 0 and 1") as caught:
            run(
                captured(network(), "export"), f"{CHOSEN},equalize-inputs{{alpha={alpha}}}",
                stats=statistics(STATS),
            )  # fmt: skip
        assert isinstance(caught.value.__cause__, OptionError)


def test_calibrated_outlier_columns_are_those_of_the_equalized_value() -> None:
    """The raw maxima would keep a column in 16 bit that is none any more."""
    text = f"{BY_MAGNITUDE},equalize-inputs,annotate-outliers"
    graph, plain = captured(network(), "export"), captured(network(), "export")
    run(graph, text, stats=statistics(STATS))
    run(plain, text.replace("equalize-inputs,", ""), stats=statistics(STATS))
    assert Annotations(linears(plain)["attn.q_proj"]).outlier_columns == [3]
    node = linears(graph)["attn.q_proj"]
    inverse = graph.attribute(Annotations(node).equalized or "")
    reached = statistics(STATS)["attn.q_proj"].absmax * inverse
    assert Annotations(node).outlier_columns == (reached > 6.0).nonzero().flatten().tolist()
    assert Annotations(node).outlier_columns != [3]


def test_calibrated_outlier_columns_of_a_rotated_value_are_not_known() -> None:
    graph = captured(network(), "export")
    history = run(graph, f"{CHOSEN},rotate-inputs,annotate-outliers", stats=statistics(STATS))
    assert reasons(history, "annotate-outliers")["attn.q_proj"] == (
        "skipped: its input was rotated after calibration, so that its maxima are not known: columns are "
        "found online"
    )


def planted(kind: str, factor: float = 50.0):  # type: ignore[no-untyped-def]
    """A model whose norms make outlier channels that its linears take back: its function is ordinary."""
    model = transformer(kind)
    layers = {"llama": lambda: model.m.model.layers, "opt": lambda: model.m.model.decoder.layers}[kind]()
    for layer in layers:
        attention = layer.self_attn
        if kind == "llama":
            pairs = [
                (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ]
        else:
            pairs = [
                (layer.self_attn_layer_norm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.final_layer_norm, [layer.fc1]),
            ]
        for norm, readers in pairs:
            for own in (norm.weight, *([norm.bias] if kind == "opt" else [])):
                own.data[[3, 17]] *= factor
            for linear in readers:
                linear.weight.data[:, [3, 17]] /= factor
    return model


@pytest.mark.parametrize("fold", ["", ",fold-input-scales"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_quantized_models_with_outlier_channels_are_closer(kind: str, fold: str) -> None:
    model = planted(kind)
    chosen = f"{NAMED},select-scheme{{default=w8a8 force=true}}"
    rest = "rewrite-mixed-linear{kernel=ref},share-quantize,fuse-epilogue,verify"
    plain, _ = rewritten(model, f"{chosen},{rest}")
    equalized, _ = rewritten(model, f"{chosen},equalize-inputs{fold},{rest}")
    assert any(node.target is torch.ops.mixq.mixed_linear.default for node in equalized.graph.nodes)
    before, after = difference(plain, model), difference(equalized, model)
    assert after < before / 4, f"relative error {before:.4f} without, {after:.4f} with equalization"


def test_the_route_of_export_keeps_the_function(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = transformer("llama")
    stats = mixq.calibrate(model, [(tokens(),)])
    program = mixq.capture(model, (tokens(),))
    text = f"{CHOSEN},equalize-inputs,fold-input-scales,rewrite-mixed-linear,prune-dead-weights,verify"
    rewritten_program, _ = mixq.compile(program, text, stats=stats)
    torch.export.save(rewritten_program, tmp_path / "equalized.pt2")
    loaded = torch.export.load(tmp_path / "equalized.pt2").module()
    expected = model(tokens())
    got = loaded(tokens())
    assert float((got - expected).norm() / expected.norm()) < 0.05
    held = {name for name, _ in loaded.named_parameters()} | {name for name, _ in loaded.named_buffers()}
    assert not [name for name in held if name.endswith("q_proj.weight")], "the originals are still there"


def test_shapes_alone_are_rewritten_alike() -> None:
    from mixq_compile.ir.without_data import shapes_only

    with shapes_only():
        model = transformer("llama")
        program = torch.export.export(model, (tokens(),), strict=False)
    graph = CapturedGraph.from_export(program)
    stats = mixq.calibrate(transformer("llama"), [(tokens(),)])
    context = PassContext(stats=stats, weights=WeightStore())
    history = Pipeline.parse(f"{CHOSEN},equalize-inputs,fold-input-scales,annotate-outliers").run(
        graph, context
    )
    verdicts = {decision.fqn: decision.verdict for decision in decisions(history, "fold-input-scales")}
    assert verdicts["m.model.layers.0.self_attn.q_proj"] == "applied"
    assert "factors that this run does not know" in str(reasons(history, "annotate-outliers").values())


def test_output_helper_sees_a_changed_graph() -> None:
    """The comparison that these tests lean on tells a wrong factor."""
    model = transformer("llama")
    graph, _ = rewritten(model, f"{NAMED},equalize-inputs")
    node = linears(graph)["m.model.layers.0.mlp.down_proj"]
    graph.attribute(Annotations(node).equalized or "").mul_(1.01)
    assert difference(graph, model) > EXACT
    assert output(graph, tokens()).shape == (2, 7, 96)


def test_the_documentation_runs_and_says_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "passes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, "docs/passes.md", "exec"), {})
    lines = [line.rpartition(" ") for line in capsys.readouterr().out.splitlines()]
    errors = {name: float(error) for name, _, error in lines}
    assert set(errors) == {"as it is", "equalized", "rotated"}
    assert errors["equalized"] < errors["as it is"] / 3, errors
    assert errors["rotated"] < errors["as it is"], errors
