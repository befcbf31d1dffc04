"""The private names of torch that this project touches: each test fails loudly where one has changed.

What to do then: find what the new torch offers, and change the one function in runtime/torch_compat.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from compiling import FEATURES, rows
from torch import Tensor, nn
from torch.fx import GraphModule

from mixq_compile import __version__
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.compiled_graph import copy_graph_module


def dynamo_graph(model: nn.Module, x: Tensor) -> tuple[GraphModule, list[Any], list[bool]]:
    """What Dynamo hands to a backend, and which of its inputs are the model's own parameters."""
    found: list[tuple[GraphModule, list[Any], list[bool]]] = []
    own = {id(parameter) for parameter in model.parameters()}

    def backend(module: GraphModule, example_inputs: list[Any]) -> Any:
        sources = ["grapharg" in n.meta for n in module.graph.nodes if n.op == "placeholder"]
        assert all(sources), "placeholders carry no meta['grapharg']: names of parameters are lost"
        found.append((module, example_inputs, [id(value) in own for value in example_inputs]))
        found.append((copy_graph_module(module), example_inputs, []))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    (module, inputs, is_own), _ = found
    return module, inputs, is_own


def test_a_backend_is_given_the_real_parameters() -> None:
    _, _, is_own = dynamo_graph(nn.Linear(FEATURES, 32), rows())
    assert sum(is_own) == 2, "Dynamo no longer passes parameters as inputs: nothing can be packed"


def test_dynamos_module_has_sources_of_its_attributes() -> None:
    module, _, _ = dynamo_graph(nn.Linear(FEATURES, 32), rows())
    assert isinstance(getattr(module, "_param_name_to_source", None), dict), (
        "AOTAutograd looks there for the source of an attribute that a backend added"
    )


class WithAttribute:
    """A backend that adds a buffer to Dynamo's module and lowers it with AOTAutograd."""

    def __init__(self, registers: bool) -> None:
        self.registers = registers

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        output = module.graph.output_node()
        (value,) = output.args[0]
        with module.graph.inserting_before(output):
            module.register_buffer("added", torch.ones(32))
            added = module.graph.get_attr("added")
            total = module.graph.call_function(torch.add, (value, added))
        output.args = ((total,),)
        module.recompile()
        if self.registers:
            torch_compat.register_attribute_sources(module, ["added"])
        return torch_compat.aot_eager(module, example_inputs)


def test_an_added_attribute_needs_a_source_and_works_with_one() -> None:
    model = nn.Linear(FEATURES, 32).requires_grad_(False)
    with torch.no_grad():
        expected = model(rows()) + 1
        torch.testing.assert_close(
            torch.compile(model, backend=WithAttribute(registers=True))(rows()), expected
        )


def test_a_copy_of_the_module_keeps_sources_of_attributes_and_inputs() -> None:
    module, _, _ = dynamo_graph(nn.Linear(FEATURES, 32), rows())
    module._param_name_to_source["x"] = "source"
    for node in module.graph.nodes:
        node._dynamo_source = f"source of {node.name}"
    copied = copy_graph_module(module)
    assert copied._param_name_to_source == module._param_name_to_source
    assert copied._param_name_to_source is not module._param_name_to_source
    placeholders = [node for node in copied.graph.nodes if node.op == "placeholder"]
    assert [node._dynamo_source for node in placeholders] == [f"source of {n.name}" for n in placeholders]


def test_compile_fx_takes_configuration_patches() -> None:
    from torch._inductor.compile_fx import compile_fx

    assert "config_patches" in inspect.signature(compile_fx).parameters


def test_the_version_is_part_of_inductors_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    seen: list[str] = []
    monkeypatch.setattr(
        inductor, "compile_fx", lambda *args, **kwargs: seen.append(torch.compiler.config.cache_key_tag)
    )
    before = torch.compiler.config.cache_key_tag
    torch_compat.inductor(GraphModule(nn.Module(), torch.fx.Graph()), [], {})
    assert seen == [f"{before}mixq-compile-{__version__}"]
    assert torch.compiler.config.cache_key_tag == before


def test_aot_eager_runs_a_graph() -> None:
    model = nn.Linear(FEATURES, 32).requires_grad_(False)
    with torch.no_grad():
        fast = torch.compile(model, backend=torch_compat.aot_eager)
        torch.testing.assert_close(fast(rows()), model(rows()))


def test_modes_are_known_to_inductor() -> None:
    assert {"default", "reduce-overhead", "max-autotune"} <= set(torch_compat.mode_names())
    assert torch_compat.mode_patches("reduce-overhead") == {"triton.cudagraphs": True}
    with pytest.raises(KeyError):
        torch_compat.mode_patches("none such")


def test_inductors_freezing_is_seen() -> None:
    import torch._inductor.config as inductor_config

    assert not torch_compat.freezing_is_on()
    with inductor_config.patch(freezing=True):
        assert torch_compat.freezing_is_on()


class TestFingerprint:
    def test_reading_leaves_it(self) -> None:
        tensor = torch.zeros(4)
        before = torch_compat.fingerprint(tensor)
        tensor.sum()
        assert torch_compat.fingerprint(tensor) == before

    def test_writing_and_new_storage_change_it(self) -> None:
        tensor = nn.Parameter(torch.zeros(4), requires_grad=False)
        seen = {torch_compat.fingerprint(tensor)}
        tensor.add_(1)
        seen.add(torch_compat.fingerprint(tensor))
        tensor.data = torch.ones(4)
        seen.add(torch_compat.fingerprint(tensor))
        tensor.copy_(torch.zeros(4))
        seen.add(torch_compat.fingerprint(tensor))
        assert len(seen) == 4

    def test_inference_tensors_have_one(self) -> None:
        with torch.inference_mode():
            tensor = torch.zeros(4)
        assert torch_compat.fingerprint(tensor) == (tensor.data_ptr(), 0)


def test_a_graph_can_be_traced_again_outside_dynamo() -> None:
    from torch._guards import TracingContext

    model = nn.Linear(FEATURES, 32).requires_grad_(False)
    module, inputs, _ = dynamo_graph(model, rows())
    captured = CapturedGraph.from_dynamo(module, inputs)
    with torch_compat.tracing(captured.fake_mode):
        assert TracingContext.get().fake_mode is captured.fake_mode


def test_a_fake_parameter_keeps_the_mark_of_a_fixed_address() -> None:
    model = nn.Linear(FEATURES, 32).requires_grad_(False)
    module, inputs, _ = dynamo_graph(model, rows())
    captured = CapturedGraph.from_dynamo(module, inputs)
    mark = getattr(model.weight, "_dynamo_static_input_type", None)
    assert mark is not None, (
        "Dynamo marks parameters in another way: CUDA graphs would copy them in every call"
    )
    fake = torch_compat.fake_parameter(captured.fake_mode, model.weight)
    assert fake.shape == model.weight.shape
    assert fake._dynamo_static_input_type == mark


def test_one_compilation_serves_every_size_of_a_dynamic_dimension() -> None:
    compiled = 0

    def count(module: GraphModule, _: Sequence[Any]) -> Any:
        nonlocal compiled
        compiled += 1
        return module

    torch.compiler.reset()
    doubled = torch.compile(lambda x: x * 2, backend=count, dynamic=False)
    for number in (2, 7, 1000):
        x = torch.ones(number, 5)
        torch_compat.mark_dynamic(x, 0)
        assert doubled(x).shape == x.shape
    assert compiled == 1
    torch.compiler.reset()


def test_a_suggested_dimension_serves_every_size_and_fails_nowhere() -> None:
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    def of_five(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 5 else x

    torch.compiler.reset()
    before = torch_compat.compiled_graphs()
    fast, narrow = torch.compile(doubled, backend="eager"), torch.compile(of_five, backend="eager")
    for number in (2, 5, 9):
        x = torch.ones(number, 5)
        torch_compat.suggest_dynamic(x, 0)
        assert fast(x).shape == x.shape
    assert torch_compat.compiled_graphs() == before + 1
    for number in (5, 3):
        x = torch.ones(number, 5)
        torch_compat.suggest_dynamic(x, 0)
        assert torch.equal(narrow(x), of_five(x))
    torch.compiler.reset()


def test_a_static_address_is_known_to_the_compiler() -> None:
    """Inductor asks for this mark: without it a CUDA graph copies the tensor at each replay."""
    from torch._dynamo.utils import get_static_address_type

    tensor = torch.ones(2)
    assert get_static_address_type(tensor) is None
    torch_compat.mark_static_address(tensor)
    assert get_static_address_type(tensor) is not None


class TestStorageUsers:
    """Counted wrongly, release_weights would free memory under its other users, or never free any."""

    def test_a_tensor_alone(self) -> None:
        tensor = nn.Parameter(torch.ones(4, 4))
        assert torch_compat.storage_users(tensor) == 1

    @pytest.mark.parametrize(
        "use",
        [
            lambda tensor: tensor.data,
            lambda tensor: tensor.detach()[1:],
            lambda tensor: tensor.untyped_storage(),
            lambda tensor: tensor.__dlpack__(),
        ],
        ids=["data", "view", "storage", "dlpack"],
    )
    def test_another_user_counts_for_as_long_as_it_lives(self, use: Callable[[Tensor], Any]) -> None:
        tensor = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        user = use(tensor)
        assert torch_compat.storage_users(tensor) > 1, type(user)
        del user
        assert torch_compat.storage_users(tensor) == 1
