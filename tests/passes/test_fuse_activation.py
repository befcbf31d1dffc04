"""`fuse-activation`: the value between two linears stays out of memory where nothing else needs it."""

import pytest
import torch
from captures import capture
from rewriting import FUSED, decisions, nodes_of, run
from torch import nn

import mixq_compile as mixq
from mixq_compile.ops.operands import set_operands
from mixq_compile.ops.providers import KernelQuery, rejections
from mixq_compile.passes import fuse_activation


class FeedForward(nn.Module):
    def __init__(self, activation, leak=False):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.activation, self.leak = activation, leak

    def forward(self, x):
        value = self.activation(self.up(x))
        result = self.down(value)
        return (result, value) if self.leak else result


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def needs_the_cpu_kernels():
    chosen, refused = rejections(KernelQuery("quantized_linear", torch.device("cpu"), torch.float32))
    if chosen is None or chosen.name != "cpu":
        pytest.skip(f"the CPU kernels are not available: {refused}")


def fused(model, example):
    program = mixq.capture(model.eval(), example)
    rewritten, history = mixq.compile(program, "aot", force=True)
    record = next(record for record in history.records if record.spec.startswith("fuse-activation"))

    return rewritten, record


@pytest.mark.parametrize("activation", [nn.functional.gelu, torch.relu, nn.GELU(), nn.ReLU()])
def test_fuses_gelu_and_relu_between_two_linears(activation):
    needs_the_cpu_kernels()
    torch.manual_seed(0)
    model, x = FeedForward(activation), torch.randn(300, 64)
    rewritten, record = fused(model, (x,))
    assert [decision.verdict for decision in record.decisions] == ["applied"]
    wanted, found = model(x), rewritten.module()(x)
    assert (found - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (FeedForward(nn.functional.gelu, leak=True), "something else reads its result: output"),
        (nn.Sequential(nn.Linear(64, 64), nn.GELU()), "no linear reads it quantized"),
    ],
)
def test_leaves_alone_what_others_read(model, reason):
    _, record = fused(model, (torch.randn(300, 64),))
    assert [decision.reason for decision in record.decisions] == [reason]


def test_leaves_functions_alone_that_no_kernel_has():
    _, record = fused(FeedForward(nn.GELU(approximate="tanh")), (torch.randn(300, 64),))
    assert [decision.reason for decision in record.decisions] == ["no kernel does both on cpu"]
    _, record = fused(FeedForward(torch.sigmoid), (torch.randn(300, 64),))
    assert not record.decisions


@pytest.mark.parametrize("function", ["relu", "silu", "gelu", "gelu_tanh"])
def test_goes_into_the_linear_alone_where_only_that_kernel_is_there(function, monkeypatch):
    torch.manual_seed(0)
    functions = {"gelu_tanh": nn.GELU(approximate="tanh")}
    model = FeedForward(functions.get(function) or getattr(nn.functional, function))
    monkeypatch.setattr(fuse_activation, "why_only_reference", lambda *asked: None)
    monkeypatch.setattr(fuse_activation, "QUANTIZING", ())
    x = torch.randn(300, 64)
    rewritten, record = fused(model, (x,))
    (decision,) = record.decisions
    assert decision.reason.startswith(f"{function} goes into the linear; the quantization stays")
    assert torch.ops.mixq.activated_linear.default in {node.target for node in rewritten.graph.nodes}
    wanted, found = model(x), rewritten.module()(x)
    assert (found - wanted).norm() / wanted.norm() < 0.02


def test_the_report_still_knows_both_linears():
    needs_the_cpu_kernels()
    model = FeedForward(nn.functional.gelu).eval().requires_grad_(False)
    fast = torch.compile(model, backend="mixq", options={"force": True, "lowering": "aot_eager"})
    x = torch.randn(300, 64)
    x[:, 9] *= 20
    fast(x)
    rows = {row.fqn: row for row in mixq.report(fast).quantized}
    assert set(rows) == {"up", "down"}
    assert rows["up"].outlier_columns == (9,)
    assert rows["down"].capacity == 16


def test_calls_that_need_the_value_with_few_rows_are_named():
    graph = capture(FeedForward(nn.ReLU()).eval(), torch.randn(300, 64), route="export")
    run(graph, FUSED)
    _, second = nodes_of(graph, "mixed_linear")
    set_operands(second, small_m=4)
    (decision,) = decisions(run(graph, f"{FUSED},fuse-activation"), "fuse-activation")
    assert decision.reason == f"with few rows these need the value itself: {second.name}"
    assert decision.details == {"blamed": [second.name]}
