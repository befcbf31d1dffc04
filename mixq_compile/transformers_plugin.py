"""Waits for transformers' list of quantizers to be imported, and registers the format then.

`import mixq_compile` loads neither torch nor transformers, and transformers has no entry points.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AWAITED = "transformers.quantizers.auto"


class _Loader(importlib.abc.Loader):
    """Loads a module as another loader does, and registers the format after that."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited module with the other finders, and steps aside for good."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that registers; None for every other module."""
        if fullname != AWAITED:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _Loader(spec.loader)
        return spec


def _register() -> None:
    try:
        from mixq_compile.runtime.transformers_registration import register

        register()
    except Exception as error:  # Whatever is wrong here must not break the import of transformers.
        warnings.warn(
            "mixq_compile could not register its format with transformers "
            f"({type(error).__name__}: {error}): quantized directories do not load by from_pretrained. It "
            "needs transformers 5.17 or newer.",
            stacklevel=2,
        )


def install() -> None:
    """Registers the format when transformers is ready for it: at once, or when it is imported."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
