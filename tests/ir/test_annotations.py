import copy
import io

import pytest
import torch
from captures import TwoLayers, linears

from mixq_compile.ir.annotations import FIELDS, Annotations
from mixq_compile.ir.graph import CapturedGraph


@pytest.fixture
def program() -> torch.export.ExportedProgram:
    return torch.export.export(TwoLayers(), (torch.randn(2, 8),))


@pytest.fixture
def node(program: torch.export.ExportedProgram) -> torch.fx.Node:
    return next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)


def test_what_is_not_set_is_none(node: torch.fx.Node) -> None:
    assert all(getattr(Annotations(node), name) is None for name in FIELDS)
    assert Annotations(node).to_json() == {}


def test_what_is_set_is_read_back_as_json_has_it(node: torch.fx.Node) -> None:
    view = Annotations(node)
    view.role = "q"
    view.outlier_columns = (3, 5)
    assert Annotations(node).role == "q"
    assert Annotations(node).to_json() == {"role": "q", "outlier_columns": [3, 5]}


def test_none_clears_one_and_clear_all(node: torch.fx.Node) -> None:
    view = Annotations(node)
    view.update({"role": "q", "skip": "too small"})
    view.skip = None
    assert view.to_json() == {"role": "q"}
    view.clear()
    assert view.to_json() == {}


def test_custom_metadata_of_others_is_left_alone(node: torch.fx.Node) -> None:
    node.meta["custom"] = {"theirs": 1}
    Annotations(node).role = "q"
    Annotations(node).clear()
    assert node.meta["custom"] == {"theirs": 1}


@pytest.mark.parametrize("value", [torch.zeros(1), object(), float("nan"), {1, 2}])
def test_what_is_not_json_is_refused(node: torch.fx.Node, value: object) -> None:
    with pytest.raises(TypeError, match="annotation role must be JSON"):
        Annotations(node).role = value


def test_an_unknown_annotation_is_refused(node: torch.fx.Node) -> None:
    with pytest.raises(AttributeError, match="Valid: fqn, role"):
        Annotations(node).update({"rôle": "q"})
    with pytest.raises(AttributeError):
        Annotations(node).rôle = "q"


def test_a_write_never_reaches_a_copy_of_the_metadata(node: torch.fx.Node) -> None:
    Annotations(node).role = "q"
    shared = dict(node.meta)
    Annotations(node).role = "k"
    assert shared["custom"]["mixq"]["role"] == "q"


def test_they_survive_copying_saving_and_the_way_to_a_module(
    program: torch.export.ExportedProgram, node: torch.fx.Node
) -> None:
    Annotations(node).update({"role": "up", "outlier_columns": [1], "origin": ["a-pass"]})
    expected = Annotations(node).to_json()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = program.module()
    for graph in (
        copy.deepcopy(program.graph_module).graph,
        module.graph,
        copy.deepcopy(module).graph,
        torch.export.load(file).graph,
        program.run_decompositions().graph,
    ):
        assert expected in [Annotations(other).to_json() for other in graph.nodes]


def test_a_captured_program_carries_them(program: torch.export.ExportedProgram, node: torch.fx.Node) -> None:
    Annotations(node).role = "up"
    assert Annotations(linears(CapturedGraph.from_export(program))[0]).role == "up"
