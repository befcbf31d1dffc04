"""No pass, view or runtime module counts the arguments of a call: operands have names.

The rule, for passes/, runtime/ and inspection/: `.args` and `.kwargs` of a node are not taken apart, put
together or given another name. Both may be handed on whole, as the arguments of one call. An operator with a
schema is read by `ops.operands.operand`, what a model's code called without one by
`ir.captured_calls.captured_argument`, a printed program by `NodeRow.operands`. Results have names too: no
number in the source is the index of a `getitem`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mixq_compile"
FOLDERS = ("passes", "runtime", "inspection")
INPUTS = ("example", "captured")
"""Names of values whose `args` are the inputs of a whole model."""
ALLOWED = {
    ("ir/linear_spellings.py", "_terms"): "additions commute: the terms have no names",
    ("ir/linear_spellings.py", "_match_addmm"): "beta and alpha can only be given by name",
    ("passes/canonicalize_linear.py", "run"): "asks only whether a call names its arguments",
    ("runtime/compiled_graph.py", "copy_graph_module"): "what the output node returns",
    ("runtime/swap_obstacles.py", "_held"): "those of a functools.partial, which is no node",
    ("runtime/torch_compat.py", "state"): "those of an exception, which is no node",
    ("inspection/node_matching.py", "_form"): "the text as a whole, with other names in it",
    ("inspection/node_matching.py", "_renamed_row"): "the text as a whole, with other names in it",
    ("inspection/program.py", "statement"): "the text as a whole, as Python",
}
"""File and function, and why it may."""


def _forwarded(parents: dict[ast.AST, ast.AST], node: ast.Attribute) -> bool:
    """True for `call(…, node.args, node.kwargs)`, where nothing is counted."""
    parent = parents[node]
    if not isinstance(parent, ast.Call):
        return False
    owner = ast.unparse(node.value)
    return {f"{owner}.args", f"{owner}.kwargs"} <= {ast.unparse(argument) for argument in parent.args}


def positions(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, innermost function and text of each place that counts arguments or results."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def function(node: ast.AST) -> str:
        while node in parents and not isinstance(node, ast.FunctionDef):
            node = parents[node]
        return node.name if isinstance(node, ast.FunctionDef) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("args", "kwargs"):
            owner = node.value
            if isinstance(owner, ast.Name) and owner.id in INPUTS:
                continue
            if not _forwarded(parents, node):
                yield node.lineno, function(node), ast.unparse(parents[node])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".getitem", "result_place")):
            counted = [each for each in node.args if isinstance(each, ast.Constant)]
            if counted or ast.unparse(node.func) == "operator.getitem":
                yield node.lineno, function(node), ast.unparse(node)


@pytest.mark.parametrize("folder", FOLDERS)
def test_arguments_have_names(folder: str) -> None:
    found = []
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        found += [
            f"mixq_compile/{name}:{line}: {text}"
            for line, function, text in positions(path.read_text())
            if (name, function) not in ALLOWED
        ]
    assert not found, "read these with operand(node, name), or captured_argument:\n" + "\n".join(found)


def test_every_exception_is_still_one() -> None:
    used = {
        (name, function)
        for name in {name for name, _ in ALLOWED}
        for _, function, _ in positions((PACKAGE / name).read_text())
    }
    assert set(ALLOWED) <= used, f"no longer needed: {sorted(set(ALLOWED) - used)}"


@pytest.mark.parametrize(
    "source",
    [
        "weight = node.args[5]",
        "operands, switch = node.args[:-2], node.args[-2:]",
        "x, codes, *rest = node.args",
        "arguments = node.args\nx = arguments[0]",
        "node.args = (*node.args[:-1], 'ref')",
        "first, *rest = tuple(node.args)",
        "call(operator, *node.args)",
        "bias = dict(enumerate(node.args)).get(2)",
        "bits = [part for part in row.args.split(', ')][-3]",
        "beta = node.kwargs['beta']",
        "def f(node):\n    return node.args",
        "codes = graph.getitem(quantized, 0)",
        "graph.call(operator.getitem, (node, 0)); operator.getitem(node.args, 3)",
        "evaluate(node.target, node.args, {})",
    ],
)
def test_every_way_to_count_is_seen(source: str) -> None:
    assert list(positions(source)), f"not seen: {source}"


@pytest.mark.parametrize(
    "source",
    [
        "weight = operand(node, 'weight_codes')",
        "graph.evaluate(node.target, node.args, node.kwargs)",
        "module(*example.args, **example.kwargs)",
        "codes = graph.result(quantized, 'codes')",
    ],
)
def test_names_and_whole_calls_are_no_counting(source: str) -> None:
    assert not list(positions(source)), f"wrongly refused: {source}"
