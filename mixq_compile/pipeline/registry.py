"""Names of passes and pipelines to what they name; a pass is imported when it is first used."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

from mixq_compile.errors import PipelineError, unknown_name
from mixq_compile.pipeline.options import OptionType
from mixq_compile.pipeline.passes import Pass

PACKAGE = "mixq_compile.passes"
ENTRY_POINT_GROUP = "mixq_compile.passes"
PIPELINES_MODULE = "pipelines"
_KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

Loader = Callable[[], type[Pass]]


class PassRegistry:
    """Passes and named pipelines that a pipeline's text may name."""

    def __init__(self, pipelines: Callable[[], Mapping[str, str]] = dict) -> None:
        """An empty registry; `pipelines` gives the named pipelines when they are first asked for."""
        self._loaders: dict[str, tuple[Loader, str]] = {}
        self._loaded: dict[str, type[Pass]] = {}
        self._pipelines = pipelines

    @classmethod
    def of(cls, *passes: type[Pass], pipelines: Mapping[str, str] | None = None) -> PassRegistry:
        """A registry of just these passes."""
        registry = cls(lambda: pipelines or {})
        for kind in passes:
            registry.add(kind.name, functools.partial(_itself, kind), kind.__module__)
        return registry

    def add(self, name: str, loader: Loader, source: str) -> None:
        """Registers a pass that `loader` imports. Raises PipelineError if the name is taken."""
        if name in self._loaders:
            raise PipelineError(
                f"two passes are named {name!r}: one in {self._loaders[name][1]}, one in {source}. "
                "Rename one, or uninstall the package that provides it."
            )
        self._loaders[name] = (loader, source)

    def add_module(self, module: ModuleType) -> tuple[str, ...]:
        """Registers every pass that a module defines; returns their names. A second time changes nothing."""
        kinds = _passes_of(module)
        for kind in kinds:
            check_pass(kind, getattr(kind, "name", ""), module.__name__)
            if self._loaded.get(kind.name) is not kind:
                self.add(kind.name, functools.partial(_itself, kind), module.__name__)
                self._loaded[kind.name] = kind
        return tuple(kind.name for kind in kinds)

    def pass_names(self) -> tuple[str, ...]:
        """Names of all passes; imports none."""
        return tuple(sorted(self._loaders))

    def get_pass(self, name: str) -> type[Pass]:
        """The class of a pass. Raises OptionError that lists the valid names."""
        if name not in self._loaders:
            raise unknown_name("pass", name, self._loaders)
        if name not in self._loaded:
            loader, source = self._loaders[name]
            kind = loader()
            check_pass(kind, name, source)
            self._loaded[name] = kind
        return self._loaded[name]

    def pipelines(self) -> Mapping[str, str]:
        """The texts of the named pipelines. Raises PipelineError where one is named as a pass is."""
        found = self._pipelines()
        clashes = sorted(set(found) & set(self._loaders))
        if clashes:
            raise PipelineError(f"{', '.join(clashes)}: a pipeline and a pass have one name. Rename one.")
        return found


def _itself(kind: type[Pass]) -> type[Pass]:
    return kind


def option_types(kind: type[Pass]) -> dict[str, OptionType]:
    """The options of a pass by name, in order."""
    hints = typing.get_type_hints(kind)
    return {option.name: OptionType.of(hints[option.name]) for option in dataclasses.fields(kind)}


def check_pass(kind: type[Pass], name: str, source: str) -> None:
    """Raises PipelineError for a class that is no valid pass of this name."""
    where = f"{source}: {kind.__qualname__}"
    given = getattr(kind, "name", None)
    if given != name or not _KEBAB.fullmatch(name):
        raise PipelineError(f"{where} must be named {name!r}, in kebab-case; it says {given!r}.")
    parameters = getattr(kind, "__dataclass_params__", None)
    if "__dataclass_fields__" not in vars(kind) or not getattr(parameters, "frozen", False):
        raise PipelineError(f"{where} must be decorated with @dataclass(frozen=True).")
    try:
        option_types(kind)
    except TypeError as error:
        raise PipelineError(f"{where}: {error}") from error
    missing = [option.name for option in dataclasses.fields(kind) if option.default is dataclasses.MISSING]
    if missing:
        raise PipelineError(f"{where}: every option needs a default value; {', '.join(missing)} has none.")


def _passes_of(module: ModuleType) -> list[type[Pass]]:
    return [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Pass) and item.__module__ == module.__name__
    ]


def _pass_of(module: ModuleType) -> type[Pass]:
    """The one pass that a module defines."""
    found = _passes_of(module)
    if len(found) != 1:
        names = ", ".join(kind.__qualname__ for kind in found) or "none"
        raise PipelineError(f"{module.__name__} must define exactly one pass; it defines {names}.")
    return found[0]


def _load_module(name: str) -> type[Pass]:
    return _pass_of(importlib.import_module(name))


def _load_entry_point(entry_point: importlib.metadata.EntryPoint) -> type[Pass]:
    kind = entry_point.load()
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise PipelineError(f"the entry point {entry_point.value!r} must name a subclass of Pass.")
    return kind


def _named_pipelines() -> Mapping[str, str]:
    texts: Mapping[str, str] = importlib.import_module(f"{PACKAGE}.{PIPELINES_MODULE}").PIPELINES
    return texts


def build_registry(
    modules: Iterable[str], entry_points: Iterable[importlib.metadata.EntryPoint]
) -> PassRegistry:
    """A registry of the modules of mixq_compile.passes and of other packages' passes."""
    registry = PassRegistry(_named_pipelines)
    for module in modules:
        if module != PIPELINES_MODULE and not module.startswith("_"):
            path = f"{PACKAGE}.{module}"
            registry.add(module.replace("_", "-"), functools.partial(_load_module, path), path)
    for entry_point in entry_points:
        registry.add(entry_point.name, functools.partial(_load_entry_point, entry_point), entry_point.value)
    return registry


@functools.cache
def default_registry() -> PassRegistry:
    """Every installed pass."""
    package = importlib.import_module(PACKAGE)
    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return build_registry(modules, importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))


def pass_names() -> tuple[str, ...]:
    """Names of all installed passes."""
    return default_registry().pass_names()


def get_pass(name: str) -> type[Pass]:
    """The class of an installed pass. Raises OptionError that lists the valid names."""
    return default_registry().get_pass(name)


def pipeline_names() -> tuple[str, ...]:
    """Names of all named pipelines."""
    return tuple(sorted(default_registry().pipelines()))
