"""The package's layers, read from its import statements: a module imports from its own layer and below."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import networkx
import pytest

from mixq_compile.passes.pipelines import PIPELINES

PACKAGE = Path(__file__).resolve().parent.parent / "mixq_compile"

BELOW: dict[str, frozenset[str]] = {}
"""What each layer may import beside itself."""


ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"


def _read_layers() -> None:
    """Reads the list of layers in the document; those below a layer stand before it."""
    (listed,) = re.findall(r"^```\n(version .*?)^```$", ARCHITECTURE.read_text(), re.DOTALL | re.MULTILINE)
    for line in listed.splitlines():
        names, _, below = line.partition(":")
        allowed = frozenset(below.split()).union(*(BELOW[name] for name in below.split()))
        BELOW.update(dict.fromkeys(names.split(), allowed))


_read_layers()

PRIVATE = {
    "torch._dynamo": ("runtime/torch_compat.py",),
    "torch._inductor": ("runtime/torch_compat.py",),
    "torch._functorch": ("runtime/torch_compat.py",),
    # Fake tensors are how shapes are known, and have no public name.
    "torch._subclasses": (
        "ir/evaluate.py",
        "ir/graph.py",
        "ir/verify.py",
        "ir/without_data.py",
    ),
    "torch._ops": ("ir/effects.py", "ir/verify.py"),
    # Dynamo writes torch.nn.functional.linear under its C name.
    "torch._C": ("ir/linear_spellings.py", "runtime/torch_compat.py", "ops/registration.py"),
    "torch.utils._pytree": ("ir/verify.py", "ir/graph.py", "runtime/export.py"),
}
"""Private modules of torch, and the only files that touch each; kernels are not looked at."""


@dataclass(frozen=True)
class Import:
    """One imported module of the package."""

    path: Path
    line: int
    module: str

    @property
    def place(self) -> str:
        return f"mixq_compile/{self.path.relative_to(PACKAGE)}:{self.line}"


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else "__init__"


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of each import: at the top, in functions, for type checkers, and by a constant name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for constant in ast.walk(node):
                if isinstance(constant, ast.Constant) and str(constant.value).startswith("mixq_compile."):
                    yield constant.lineno, str(constant.value).rstrip(".")


def package_imports(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(), str(path))
    return [
        Import(path, line, module)
        for line, module in imported_modules(tree)
        if module.split(".")[0] == "mixq_compile"
    ]


def target_layer(module: str) -> str:
    parts = module.split(".")[1:]
    known = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file() if parts else False
    return parts[0] if known else "__init__"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = layer_of(path.relative_to(PACKAGE).parts)
    assert own in BELOW, f"{own} is a new layer: say in {ARCHITECTURE.name} what it may import"
    wrong = [
        f"{entry.place}: {own} may not import {entry.module}; it may import {', '.join(sorted(BELOW[own]))}"
        for entry in package_imports(path)
        if (target := target_layer(entry.module)) != own and target not in BELOW[own]
    ]
    assert not wrong, "\n".join(wrong)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(imports: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    graph = networkx.DiGraph((module, target) for module, targets in imports.items() for target in targets)
    return sorted(sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1)


def module_imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports; `a.b.name` counts as the module `a.b`."""
    modules = {module_of(path): path for path in sources()}

    def known(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {target for entry in package_imports(path) if (target := known(entry.module)) != module}
        for module, path in modules.items()
    }


def test_no_module_imports_itself_through_others() -> None:
    found = circles(module_imports())
    assert not found, "modules that import each other:\n" + "\n".join(", ".join(group) for group in found)


@pytest.mark.parametrize(
    "source",
    [
        "from mixq_compile.second import name",
        "import mixq_compile.second",
        "if TYPE_CHECKING:\n    from mixq_compile.second import Name",
        "def later():\n    from mixq_compile import second",
        "import importlib\ndef later():\n    importlib.import_module('mixq_compile.second')",
        "from importlib import import_module\nimport_module(f'mixq_compile.second.{name}')",
    ],
)
def test_every_way_to_import_is_seen(source: str) -> None:
    names = [name for _, name in imported_modules(ast.parse(source))]
    assert any(name.startswith("mixq_compile.second") for name in names), f"not seen: {source}"
    assert circles({"first": {"second"}, "second": {"first"}, "third": {"first"}}) == [["first", "second"]]


def dotted_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    yield from imported_modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("private", PRIVATE)
def test_private_names_of_torch_are_touched_only_where_listed(private: str) -> None:
    found: dict[str, int] = {}
    for path in sources():
        relative = str(path.relative_to(PACKAGE))
        if relative.startswith("kernels/"):
            continue
        for line, name in dotted_names(ast.parse(path.read_text())):
            if name == private or name.startswith(f"{private}."):
                found.setdefault(relative, line)
    extra = {path: line for path, line in found.items() if path not in PRIVATE[private]}
    assert not extra, f"{private} is private: touch it behind runtime/torch_compat.py, not in {extra}"
    unused = set(PRIVATE[private]) - set(found)
    if not private.startswith("torch._functorch"):
        assert not unused, f"{sorted(unused)} no longer touch {private}: shorten the list in this file"


def test_kernels_is_no_regular_package() -> None:
    """A regular top-level package `kernels` would shadow Hugging Face's, which transformers imports."""
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


def test_modules_stay_short() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in sources()
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, f"split these modules: {long}"


def test_each_layer_exists_and_is_described() -> None:
    table = ARCHITECTURE.read_text().partition("## Where things are")[2].partition("\n\nA module")[0]
    for layer in set(BELOW) - {"__init__"}:
        name = f"{layer}/" if (PACKAGE / layer).is_dir() else f"{layer}.py"
        assert (PACKAGE / name).exists(), f"{layer} is listed and does not exist"
        assert f"{name}`" in table, f"{ARCHITECTURE.name} does not say what lives in {name}"


def test_the_passes_of_the_default_pipeline_are_described_in_order() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    assert rows == PIPELINES["jit"].split(",")
