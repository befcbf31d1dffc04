"""Which attributes a function's source reads of the objects that it is given: `self.mixer.dt_proj.weight`."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Step = tuple[str, Any]
"""`("attribute", name)`, `("pattern", glob)` of attribute names, or `("item", key)`; key None: any item."""
Path = tuple[str, tuple[Step, ...]]
"""A parameter of the function, and the steps from it."""
Paths = frozenset[Path]

NOTHING: Paths = frozenset()
ANY_ITEM: Step = ("item", None)
LONGEST_PATH = 8
PAIRED = ("enumerate", "items", "named_children")
"""Iterations whose second value is the element."""
PLAIN_QUESTIONS = ("hasattr", "id", "isinstance", "len", "type")


@dataclass(frozen=True)
class Call:
    """A call that hands an object on: to a method of the first parameter, or to a global function."""

    name: str
    is_method: bool
    positional: tuple[Paths, ...]
    named: Mapping[str, Paths]


@dataclass
class FunctionReads:
    """What one function does with an attribute of the objects below its parameters."""

    parameters: tuple[str, ...]
    reads: set[Path] = field(default_factory=set)
    """Objects whose attribute is read for its value; questions about metadata are left out."""
    writes: set[Path] = field(default_factory=set)
    """Objects whose attribute is set, or handed to a function that ends in `_`."""
    calls: list[Call] = field(default_factory=list)


def mentions(code: types.CodeType, attribute: str) -> bool:
    """True where a function's code, inner functions included, names the attribute."""
    if attribute in code.co_names or attribute in code.co_consts:
        return True
    return any(isinstance(inner, types.CodeType) and mentions(inner, attribute) for inner in code.co_consts)


@functools.lru_cache(maxsize=4096)
def attribute_reads(code: types.CodeType, attribute: str, metadata: frozenset[str]) -> FunctionReads | None:
    """What a function does with `attribute`; None where its source is not known.

    `metadata` are attributes and methods of the attribute's value that tell nothing of its numbers.
    """
    node = _functions(code.co_filename).get((code.co_name, code.co_firstlineno))
    return None if node is None else _Reader(node, attribute, metadata).found


@functools.lru_cache(maxsize=256)
def _functions(file: str) -> dict[tuple[str, int], ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a source file by name and first line, a decorator's where there is one."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return {}
    return {
        (node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)])): node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


class _Reader:
    """Reads one function, without regard to the order of its statements."""

    def __init__(
        self, function: ast.FunctionDef | ast.AsyncFunctionDef, attribute: str, metadata: frozenset[str]
    ) -> None:
        self.attribute, self.metadata = attribute, metadata
        arguments = function.args
        names = [entry.arg for entry in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        self.found = FunctionReads(tuple(names))
        self.known: dict[str, Paths] = {name: frozenset({(name, ())}) for name in names}
        self.nodes = list(_live(function, names[0] if names else ""))
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        while self._bind_all():
            pass
        for node in self.nodes:
            self._look(node)

    def _bind_all(self) -> bool:
        """Follows assignments and loops once; true where a name has got a new meaning."""
        before = dict(self.known)
        for node in self.nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._bind(node.target, node.value)
            elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
                self._bind_elements(node.target, node.iter)
        return before != self.known

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._add(target, self.paths(value))
        elif (
            isinstance(target, (ast.Tuple, ast.List))
            and isinstance(value, (ast.Tuple, ast.List))
            and len(target.elts) == len(value.elts)
        ):
            for inner, part in zip(target.elts, value.elts, strict=True):
                self._bind(inner, part)

    def _add(self, target: ast.expr, paths: Paths) -> None:
        if isinstance(target, ast.Name) and paths:
            self.known[target.id] = self.known.get(target.id, NOTHING) | paths

    def _bind_elements(self, target: ast.expr, iterated: ast.expr) -> None:
        called = _called_name(iterated)
        inner = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
        if called == "zip" and isinstance(iterated, ast.Call):
            for each, argument in zip(inner, iterated.args, strict=False):
                self._bind_elements(each, argument)
        elif called in PAIRED and len(inner) == 2:
            self._bind_elements(inner[1], _iterated(iterated))
        else:
            self._add(target, self._elements(iterated))

    def _elements(self, iterated: ast.expr) -> Paths:
        if isinstance(iterated, (ast.Tuple, ast.List)):
            return frozenset(path for entry in iterated.elts for path in self.paths(entry))
        if _called_name(iterated) in ("reversed", "values", "children", "list", "tuple"):
            return self._elements(_iterated(iterated))
        return _extended(self.paths(iterated), ANY_ITEM)

    def paths(self, node: ast.expr) -> Paths:
        """What an expression may stand for."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, NOTHING)
        if isinstance(node, ast.Attribute):
            return _extended(self.paths(node.value), ("attribute", node.attr))
        if isinstance(node, ast.Subscript):
            key = node.slice
            if isinstance(key, ast.Slice):
                return self.paths(node.value)
            return _extended(self.paths(node.value), ("item", _constant(key)))
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        if isinstance(node, ast.BoolOp):
            return frozenset(path for value in node.values for path in self.paths(value))
        if isinstance(node, ast.NamedExpr):
            return self.paths(node.value)
        if isinstance(node, ast.Call) and len(node.args) >= 2 and _called_name(node) == "getattr":
            step = _named_step(node.args[1])
            return _extended(self.paths(node.args[0]), step) if step else NOTHING
        if isinstance(node, ast.Call) and len(node.args) == 1 and _called_name(node) == "get_submodule":
            name, found = _constant(node.args[0]), self.paths(_iterated(node))
            for part in name.split(".") if isinstance(name, str) else ():
                found = _extended(found, ("attribute", part))
            return found if isinstance(name, str) else NOTHING
        return NOTHING

    def _look(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self._look_at_call(node)
        if not isinstance(node, (ast.Attribute, ast.Name, ast.Call)):
            return
        last = ("attribute", self.attribute)
        owners = {(root, steps[:-1]) for root, steps in self.paths(node) if steps and steps[-1] == last}
        if not owners:
            return
        if not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            use = self._use(node)
        else:
            use = "write" if isinstance(node, ast.Attribute) else "none"
        if use == "read":
            self.found.reads |= owners
        elif use == "write":
            self.found.writes |= owners

    def _use(self, node: ast.AST) -> str:
        """What becomes of the attribute's value: `read`, `write`, or `none` of its numbers."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.Attribute):
            if parent.attr in ("data", "detach"):
                if isinstance(parent.ctx, ast.Store):
                    return "write"
                call = self.parents.get(parent)
                return self._use(call if isinstance(call, ast.Call) and call.func is parent else parent)
            if parent.attr in self.metadata or isinstance(parent.ctx, ast.Store):
                return "none"
            return "write" if parent.attr.endswith("_") and not parent.attr.endswith("__") else "read"
        if isinstance(parent, (ast.Assign, ast.AnnAssign)):
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            return "none" if all(isinstance(target, ast.Name) for target in targets) else "read"
        if isinstance(parent, ast.NamedExpr):
            return "none" if node is parent.target else self._use(parent)
        if isinstance(parent, ast.Compare):
            return "none" if all(isinstance(each, (ast.Is, ast.IsNot)) for each in parent.ops) else "read"
        if isinstance(parent, ast.Call) and node is not parent.func:
            called = _called_name(parent)
            if called == "getattr" and len(parent.args) > 1:
                name = _constant(parent.args[1])
                return "none" if name in self.metadata else "read"
            if called in PLAIN_QUESTIONS or called in self.metadata:
                return "none"
            return "write" if called.endswith("_") and not called.endswith("__") else "read"
        if isinstance(parent, (ast.Expr, ast.Assert)):
            return "none"
        return "read"

    def _look_at_call(self, node: ast.Call) -> None:
        positional = tuple(self.paths(argument) for argument in node.args)
        named = {entry.arg: self.paths(entry.value) for entry in node.keywords if entry.arg}
        if not any((*positional, *named.values())):
            return
        if isinstance(node.func, ast.Name):
            self.found.calls.append(Call(node.func.id, False, positional, named))
        elif isinstance(node.func, ast.Attribute) and self._is_first_parameter(node.func.value):
            self.found.calls.append(Call(node.func.attr, True, positional, named))

    def _is_first_parameter(self, node: ast.expr) -> bool:
        return bool(self.found.parameters) and self.paths(node) == {(self.found.parameters[0], ())}


def _live(node: ast.AST, self_name: str) -> Iterator[ast.AST]:
    """A function's nodes without those that only training runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_training(child.test, self_name):
            for inner in child.orelse:
                yield inner
                yield from _live(inner, self_name)
            continue
        yield child
        yield from _live(child, self_name)


def _is_training(test: ast.expr, self_name: str) -> bool:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_is_training(value, self_name) for value in test.values)
    return ast.unparse(test) == f"{self_name}.training"


def _extended(paths: Paths, step: Step) -> Paths:
    return frozenset((root, (*steps, step)) for root, steps in paths if len(steps) < LONGEST_PATH)


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _named_step(node: ast.expr) -> Step | None:
    """The step of `getattr(…, node)`; None where the name cannot be known."""
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values]
        return "pattern", "".join(parts)
    name = _constant(node)
    return ("attribute", name) if isinstance(name, str) else None


def _called_name(node: ast.expr) -> str:
    """The last part of what a call calls; empty for any other expression."""
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def _iterated(node: ast.expr) -> ast.expr:
    """`x` in `x.items()` and in `enumerate(x)`."""
    assert isinstance(node, ast.Call)
    if isinstance(node.func, ast.Attribute):
        return node.func.value
    return node.args[0] if node.args else node.func


def unwrapped(value: Any) -> types.FunctionType | None:
    """The function in Python behind a method, a property or a decorator; None where there is none."""
    for name in ("fget", "func", "__func__"):
        if not isinstance(value, types.FunctionType):
            value = getattr(value, name, value)
    if callable(value):
        try:
            value = inspect.unwrap(value)
        except ValueError:
            return None
    return value if isinstance(value, types.FunctionType) else None
