"""Names of modules and parameters: the same text whichever way a model was captured.

Dynamo writes sources (`L['self']._modules['layers']._modules['0']`), torch.export writes paths
(`layers.0`); both normalise to `layers.0`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from torch.fx import Node

_TOKEN = re.compile(
    r"""\.?slice\([^)]*\)                               # self.layers[:n] keeps the indexes of layers
      | \.?(?P<attribute>[A-Za-z_]\w*|\d+)              # .name, and .0 of a path
      | \[(?P<quote>['"])(?P<key>.*?)(?P=quote)\]       # ['name']
      | \[(?P<index>-?\d+)\]                            # [0]
      | @\d+                                            # the n-th call of one module
    """,
    re.VERBOSE,
)
_GETATTR = re.compile(r"getattr\((?P<base>.*), ?(['\"])(?P<name>.*?)\2\)(?P<rest>.*)")
_CONTAINERS = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_SCOPED = re.compile(r"(getattr\()*[LG]\[")
_OWNED_TENSOR = re.compile(r"(\._parameters|\._buffers)\[(['\"]).*?\2\]$")
_EXPORT_ROOT = re.compile(r"^L__\w*?self__+")


def _tokens(text: str) -> list[str] | None:
    """The parts of a source or path, outermost first; None where the text is neither."""
    getattr_call = _GETATTR.fullmatch(text)
    if getattr_call is not None:
        base, rest = _tokens(getattr_call["base"]), _tokens(getattr_call["rest"])
        return None if base is None or rest is None else [*base, getattr_call["name"], *rest]
    parts: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        part = match["attribute"] or match["key"] or match["index"]
        if part is not None:
            parts.append(part)
        position = match.end()
    return parts


@functools.lru_cache(maxsize=65536)
def split_source(text: str) -> tuple[str, str]:
    """The root of a source and the normal name below it.

    The root is the variable that holds the model (`self`, `fn`, a global's name), empty for a path.
    """
    stripped = _EXPORT_ROOT.sub("", text)
    if stripped != text:
        return "self", split_source(stripped)[1] if stripped else ""
    parts = _tokens(text)
    if parts is None:
        return "", text
    root = ""
    if _SCOPED.match(text) and len(parts) > 1:
        root, parts = parts[1], parts[2:]
    for marker, taken in (("cell_contents", 1), ("__globals__", 2), ("__self__", 1)):
        if marker in parts:
            position = len(parts) - 1 - parts[::-1].index(marker)
            root, parts = ".".join((root, *parts[:position])), parts[position + taken :]
    names = [part for part in parts if part not in _CONTAINERS and part not in _WRAPPERS]
    return root, ".".join(names)


def normalise_fqn(text: str) -> str:
    """The fully-qualified name of a module or parameter, below the model that was captured.

    A text that is no source and no path is returned as it is.
    """
    return split_source(text)[1]


def is_owned_tensor(source: str) -> bool:
    """True for the source of a module's parameter or buffer; false for an input of the call."""
    return _OWNED_TENSOR.search(source) is not None


def module_source(node: Node) -> str | None:
    """The innermost module whose forward made a node, as the capture wrote it; None if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = next(reversed(stack.values()))
    return None if path == "_empty_nn_module_stack_from_metadata_hook" else str(path)


def module_type(node: Node) -> str | None:
    """The class of the innermost module whose forward made a node, such as `transformers...LlamaMLP`."""
    stack = node.meta.get("nn_module_stack")
    return _type_name(next(reversed(stack.values()))[1]) if stack else None


def outermost_type(node: Node) -> str | None:
    """The class of the outermost module around a node, torch's own left out; None if there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = (_type_name(kind) for _, kind in stack.values())
    return next((kind for kind in kinds if not kind.startswith("torch.")), None)


def _type_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def module_fqn(node: Node) -> str:
    """The normal name of the module whose forward made a node; empty where it is unknown."""
    source = module_source(node)
    return normalise_fqn(source) if source is not None else ""


def source_text(node: Node) -> str | None:
    """The source of a Dynamo placeholder; None for every other node."""
    argument: Any = node.meta.get("grapharg")
    source = getattr(argument, "source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


_FRAME = re.compile(r'^\s*File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.*)$')


@functools.lru_cache(maxsize=8192)
def _python_line(trace: str) -> str:
    lines = trace.splitlines()
    frames = [(match, position) for position, line in enumerate(lines) if (match := _FRAME.match(line))]
    if not frames:
        return ""
    own = [frame for frame in frames if "/torch/" not in frame[0]["file"].replace("\\", "/")]
    match, position = (own or frames)[-1]
    code = lines[position + 1].strip() if position + 1 < len(lines) else ""
    return f'File "{match["file"]}", line {match["line"]}, in {match["function"]}: {code}'.rstrip(": ")


def location(node: Node) -> str:
    """The line of the model's Python code that a node comes from; empty where none was recorded."""
    return _python_line(node.meta.get("stack_trace") or "")
