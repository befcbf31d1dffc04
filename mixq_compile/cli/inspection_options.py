"""What the inspecting commands share: how to capture MODEL, and which passes to run over it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.benchmarking.choices import parse_batch
from mixq_compile.cli.capturing import DEFAULT_BATCH, Captured, capture_model
from mixq_compile.cli.options import (
    Capacity,
    Device,
    Dtype,
    Force,
    Miss,
    Scheme,
    StatsFile,
    Threshold,
    valid,
)
from mixq_compile.errors import OptionError
from mixq_compile.schemes.registry import get_scheme

if TYPE_CHECKING:
    from mixq_compile.ir.graph import CapturedGraph
    from mixq_compile.pipeline import PassContext, Pipeline
    from mixq_compile.runtime.options import MixqOptions

InspectedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face directory or hub name, module:function, an exported .pt2, or the shape of a known "
        "model (llama-2-7b, qwen2-7b …).",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class CaptureOptions:
    """How MODEL is captured."""

    batch: Annotated[
        str,
        typer.Option(callback=valid(parse_batch), help="Sequences x tokens that the model is captured with."),
    ] = DEFAULT_BATCH
    no_weights: Annotated[
        bool,
        typer.Option(
            "--no-weights", help="Capture shapes only: fast, and a model of any size fits into memory."
        ),
    ] = False
    device: Device = "auto"
    dtype: Dtype = "auto"

    def capture(self, source: str) -> Captured:
        """Captures the model; says on stderr how long it took."""
        from mixq_compile.cli.output import step

        with step(f"capturing {source}"):
            return capture_model(
                source, device=self.device, dtype=self.dtype, batch=self.batch, weights=not self.no_weights
            )


@dataclass(frozen=True)
class PipelineChoice:
    """Which passes run over the captured graph, and with which options."""

    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            "-p",
            metavar="PIPELINE",
            help="A pipeline's name or text, such as canonicalize-linear,select-scheme{force=true}.  "
            "[dim]\\[default: aot; swapped for a quantized model][/dim]",
        ),
    ] = None
    scheme: Scheme = "w8a8o16"
    stats: StatsFile = None
    threshold: Threshold = None
    capacity: Capacity = None
    miss: Miss = None
    force: Force = False
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Name, part of a name or glob pattern of linears to leave alone; repeatable."),
    ] = None
    load: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="Python module (or file) with passes of your own, which PIPELINE may then name; repeatable.",
        ),
    ] = None
    fuel: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many rewrites.  [dim]\\[default: no limit][/dim]")
    ] = None

    def options(self) -> MixqOptions:
        """The choice as the backend's options. Raises OptionError for a wrong one."""
        from mixq_compile.runtime.options import MixqOptions

        get_scheme(self.scheme)
        for module in self.load or ():
            load_passes(module)
        given: dict[str, Any] = {
            "scheme": self.scheme,
            "stats": self.stats,
            "threshold": self.threshold,
            "capacity": self.capacity,
            "miss": self.miss,
            "force": self.force,
            "pipeline": self.pipeline,
        }
        if self.ignore:
            given["ignore"] = tuple(self.ignore)
        return MixqOptions.from_user(options=given)

    def pipeline_of(self, graph: CapturedGraph) -> Pipeline:
        """The pipeline that this choice means for a graph."""
        from mixq_compile.runtime.plan import default_pipeline, pipeline_for

        return pipeline_for(self.options(), default_pipeline(graph, ordinary="aot"))

    def context(self, options: MixqOptions, fuel: int | None = None) -> PassContext:
        """A new context for one run; `fuel` in place of the chosen one."""
        from mixq_compile.pipeline import Fuel, PassContext
        from mixq_compile.runtime.weight_store import WeightStore

        return PassContext(
            stats=options.stats, weights=WeightStore(), fuel=Fuel(self.fuel if fuel is None else fuel)
        )


def load_passes(module: str) -> None:
    """Imports a module or file and lets pipelines name the passes that it defines.

    The working directory is searched first. Raises OptionError where it cannot be imported or defines
    no pass.
    """
    from mixq_compile.pipeline.registry import default_registry

    path = Path(module)
    name = path.stem if path.suffix == ".py" else module
    folder = str(path.resolve().parent if path.suffix == ".py" else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        loaded = importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"--load {module}: {error}. Give a file of Python, or a module that can be imported from here."
        ) from error
    if not default_registry().add_module(loaded):
        raise OptionError(
            f"--load {module}: it defines no pass, a frozen dataclass that derives from "
            "mixq_compile.pipeline.Pass."
        )
