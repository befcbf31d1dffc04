"""Every touch of a private torch name, one small function each.

tests/runtime/test_torch_compat.py fails on a torch where one of them no longer does what is said here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mixq_compile.version import __version__

SET_GRADIENTS = torch._C._set_grad_enabled
"""What Dynamo's graphs call where a model turns gradients on or off."""


def register_attribute_sources(module: GraphModule, names: Sequence[str]) -> None:
    """Gives attributes that a backend added to Dynamo's graph module a source.

    Without one, AOTAutograd fails with `<name> not found in param_name_to_source`.
    """
    from torch._dynamo.source import AttrSource, LocalSource

    sources = getattr(module, "_param_name_to_source", None)
    if sources is None:
        return
    for name in names:
        sources[name] = AttrSource(LocalSource("__mixq"), name)


def copy_attribute_sources(module: GraphModule, copy: GraphModule) -> None:
    """Gives a copy of Dynamo's graph module what AOTAutograd looks for on the original."""
    sources = getattr(module, "_param_name_to_source", None)
    if sources is not None:
        copy._param_name_to_source = dict(sources)  # type: ignore[assignment]


def copy_node_source(node: Node, copy: Node) -> None:
    """Gives the copy of a placeholder the source that AOTAutograd asks it for."""
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        copy._dynamo_source = source  # type: ignore[attr-defined]


def passed_on(error: Exception) -> Exception:
    """The same error in a class that Dynamo hands on as it is, not within its `BackendCompilerFailed`.

    Its `inner_exception` is the error itself, as that of `BackendCompilerFailed` is.
    """
    from torch._dynamo.exc import ShortenTraceback

    def state(self: Exception) -> None:
        Exception.__init__(self, *error.args)
        self.first_useful_frame = None  # type: ignore[attr-defined]
        vars(self).update(vars(error))

    kind = type(error)
    names = {"__init__": state, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: Exception = type(kind.__name__, (kind, ShortenTraceback), names)()
    made.inner_exception = error  # type: ignore[attr-defined]
    return made


def tracing(fake_mode: Any) -> AbstractContextManager[Any]:
    """What Dynamo sets up around a backend, for compiling one of its graphs again later."""
    from torch._guards import TracingContext
    from torch._guards import tracing as trace

    return trace(TracingContext(fake_mode))


def fake_parameter(fake_mode: Any, parameter: torch.Tensor) -> torch.Tensor:
    """A fake tensor for a parameter; it keeps the mark that its address is fixed."""
    fake = fake_mode.from_tensor(parameter, static_shapes=True)
    mark = getattr(parameter, "_dynamo_static_input_type", None)
    if mark is not None:
        fake._dynamo_static_input_type = mark
    return fake  # type: ignore[no-any-return]


def inductor(
    module: GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compiles with AOTAutograd and Inductor under these configuration patches.

    Inductor's cache knows operators by name only, so this package's version goes into its key.
    """
    from torch._inductor.compile_fx import compile_fx

    tag = f"{torch.compiler.config.cache_key_tag}mixq-compile-{__version__}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(module, list(example_inputs), config_patches=patches)  # type: ignore[return-value]


def aot_eager(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Traces with AOTAutograd and runs the result operator by operator: no code generation."""
    from torch._dynamo.backends.debugging import aot_eager as backend

    return backend(module, list(example_inputs))  # type: ignore[no-any-return]


def mode_patches(mode: str) -> dict[str, Any]:
    """Inductor's configuration for a `torch.compile` mode. Raises KeyError for an unknown mode."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options()[mode])


def mode_names() -> tuple[str, ...]:
    """The modes that `torch.compile` knows."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def compile_id() -> str:
    """What torch calls the compilation under way, such as `0/1`; empty outside of one."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return "" if current is None else str(current)


def trace_artifact(name: str, payload: Callable[[], str], encoding: str = "string") -> None:
    """Hands a text to torch's structured trace (TORCH_TRACE), which tlparse shows; else it is not made."""
    from torch._logging import trace_structured  # type: ignore[attr-defined]

    trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def freezing_is_on() -> bool:
    """True where the user asked Inductor to bake parameters into the compiled code."""
    import torch._inductor.config as inductor_config

    return bool(inductor_config.freezing)


def fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when a tensor was written in place or given other storage."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version


def storage_users(tensor: torch.Tensor) -> int:
    """How many tensors, arrays and handles share a tensor's memory, itself included."""
    return _references(tensor) - _references(torch.empty(1, dtype=torch.uint8, device="cpu")) + 1


def _references(tensor: torch.Tensor) -> int:
    """References to a tensor's storage, to the storage's Python object and, from C++, to the tensor."""
    storage = tensor.untyped_storage()
    shared = int(torch._C._storage_Use_Count(storage._cdata))  # type: ignore[attr-defined]
    return shared + sys.getrefcount(storage) + tensor._use_count()  # type: ignore[attr-defined,no-any-return]


def mark_dynamic(tensor: torch.Tensor, dimension: int) -> None:
    """Lets one compilation serve every size (from 2 up) of a dimension, where others stay fixed."""
    torch._dynamo.mark_dynamic(tensor, dimension)


def compiled_graphs() -> int:
    """How many graphs Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def suggest_dynamic(tensor: torch.Tensor, dimension: int) -> None:
    """Like `mark_dynamic`, but a model that needs one size compiles for each instead of failing."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def mark_static_address(tensor: torch.Tensor) -> None:
    """Says that a tensor stays where it is: CUDA graphs read and write it there instead of copying it."""
    torch._dynamo.mark_static_address(tensor)
