"""The program that a snapshot prints can be read and run."""

import pytest
import torch
from captures import ROUTES, TwoLayers, capture, small_llama
from inspected_models import reference_pipeline
from torch.utils._pytree import tree_leaves

from mixq_compile.inspection.program import program_line, program_text, statement
from mixq_compile.ir.snapshot import NodeRow, Snapshot
from mixq_compile.pipeline import PassContext
from mixq_compile.runtime.weight_store import WeightStore


def run_program(snapshot: Snapshot, module: torch.nn.Module, *inputs: object) -> list[torch.Tensor]:
    namespace: dict[str, object] = {}
    exec(program_text(snapshot), namespace)
    with torch.no_grad():
        return tree_leaves(namespace["forward"](module, *inputs))  # type: ignore[operator]


@pytest.mark.parametrize("rewritten", [False, True])
def test_it_computes_what_the_graph_computes(rewritten: bool) -> None:
    model, ids = small_llama()
    graph = capture(model, input_ids=ids, route="export")
    if rewritten:
        reference_pipeline().run(graph, PassContext(weights=WeightStore()))
    with torch.no_grad():
        expected = tree_leaves(graph.module(input_ids=ids))
    found = run_program(Snapshot.of(graph), graph.module, ids)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_it_is_python_by_either_route(route: str) -> None:
    graph = capture(TwoLayers(), torch.randn(2, 8), route=route)
    text = program_text(Snapshot.of(graph))
    compile(text, "program", "exec")
    assert "# float32[2, 16]" in text


def row(op: str, target: str, args: str = "", **fields: object) -> NodeRow:
    given = {"name": "y", "inputs": (), "value": "", "fqn": "", "where": "", **fields}
    return NodeRow(op=op, target=target, args=args, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (row("call_function", "aten.add.Tensor", "%x, 1"), "y = torch.ops.aten.add.Tensor(x, 1)"),
        (row("call_function", "getitem", "%x, 0"), "y = operator.getitem(x, 0)"),
        (row("call_function", "nn.functional.silu", "%x"), "y = torch.nn.functional.silu(x)"),
        (row("call_method", "view", "%x, 2, -1"), "y = x.view(2, -1)"),
        (row("get_attr", "layers.0.weight"), "y = self.get_submodule('layers.0').weight"),
        (row("get_attr", "0"), "y = getattr(self, '0')"),
        (row("output", "output", "(%x, %z)"), "return (x, z)"),
        (row("call_function", "mixq.f.default", "%x, 'a %b'"), "y = torch.ops.mixq.f.default(x, 'a %b')"),
    ],
)
def test_statements(node: NodeRow, expected: str) -> None:
    assert statement(node) == expected


def test_type_scheme_and_origin_stand_behind_a_line() -> None:
    notes = {"scheme": "w8a8o16", "origin": ["rewrite-mixed-linear", "fuse-epilogue"]}
    line = program_line(row("call_function", "aten.neg.default", "%x", value="int8[2]", annotations=notes))
    assert line.endswith("  # int8[2] | w8a8o16 | by rewrite-mixed-linear, fuse-epilogue")
