"""mixq_compile: a torch.compile backend and pass framework for outlier-aware mixed-precision inference.

`torch.compile(model, backend="mixq")` needs no import of this package. Its functions are imported
when they are first used, so that `import mixq_compile` loads neither torch, triton nor transformers. It makes
transformers read quantized directories, once that is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mixq_compile.transformers_plugin import install as _install
from mixq_compile.version import __version__

_HOME = {
    "CalibrationStats": "mixq_compile.calibration",
    "MixqConfig": "mixq_compile.runtime.transformers_config",
    "MixqLinear": "mixq_compile.runtime.mixq_linear",
    "MixqOptions": "mixq_compile.runtime.options",
    "calibrate": "mixq_compile.calibration",
    "capture": "mixq_compile.runtime.export",
    "compile": "mixq_compile.runtime.export",
    "freeze": "mixq_compile.runtime.outlier_control",
    "hold_states": "mixq_compile.runtime.outlier_control",
    "load": "mixq_compile.runtime.program_files",
    "load_pretrained": "mixq_compile.runtime.checkpoint_loading",
    "prepare_for_generation": "mixq_compile.runtime.generation",
    "quantize": "mixq_compile.runtime.quantize",
    "refresh": "mixq_compile.runtime.outlier_control",
    "report": "mixq_compile.runtime.report",
    "reset": "mixq_compile.runtime.outlier_control",
    "restore_generation": "mixq_compile.runtime.generation",
    "save": "mixq_compile.runtime.program_files",
    "save_pretrained": "mixq_compile.runtime.checkpoint_saving",
}

__all__ = [
    "CalibrationStats",
    "MixqConfig",
    "MixqLinear",
    "MixqOptions",
    "__version__",
    "calibrate",
    "capture",
    "compile",
    "freeze",
    "hold_states",
    "load",
    "load_pretrained",
    "prepare_for_generation",
    "quantize",
    "refresh",
    "report",
    "reset",
    "restore_generation",
    "save",
    "save_pretrained",
]

if TYPE_CHECKING:
    from mixq_compile.calibration import CalibrationStats, calibrate
    from mixq_compile.runtime.checkpoint_loading import load_pretrained
    from mixq_compile.runtime.checkpoint_saving import save_pretrained
    from mixq_compile.runtime.export import capture, compile
    from mixq_compile.runtime.generation import prepare_for_generation, restore_generation
    from mixq_compile.runtime.mixq_linear import MixqLinear
    from mixq_compile.runtime.options import MixqOptions
    from mixq_compile.runtime.outlier_control import freeze, hold_states, refresh, reset
    from mixq_compile.runtime.program_files import load, save
    from mixq_compile.runtime.quantize import quantize
    from mixq_compile.runtime.report import report
    from mixq_compile.runtime.transformers_config import MixqConfig


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mixq_compile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


_install()
