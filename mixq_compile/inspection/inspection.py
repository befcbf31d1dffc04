"""What is known about one compilation of a model, as a value: its histories and what became of each layer.

Its JSON is the master format; the terminal, the HTML report and comparisons are views of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mixq_compile.errors import OptionError
from mixq_compile.inspection.cost import DeviceFigures, costs_of
from mixq_compile.inspection.layers import LayerSummary, layers_of
from mixq_compile.pipeline.history import History
from mixq_compile.version import __version__

FORMAT = "mixq-inspection"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class InspectedGraph:
    """One captured graph of a model, and what the passes made of it."""

    name: str
    """The compile id that torch gave it, such as `0/1`; empty for the one graph of an export."""
    history: History
    layers: tuple[LayerSummary, ...]
    """Every linear, in the order in which they run."""

    @classmethod
    def of(cls, history: History, name: str = "", figures: DeviceFigures | None = None) -> InspectedGraph:
        """What a history tells of its graph, with costs where a device's figures are given."""
        layers = layers_of(history)
        if figures is not None:
            layers = tuple(dataclasses.replace(layer, costs=costs_of(layer, figures)) for layer in layers)
        return cls(name, history, layers)

    def layer(self, fqn: str) -> LayerSummary | None:
        """The layer of this name; None where the graph has no such linear."""
        return next((layer for layer in self.layers if layer.fqn == fqn), None)


@dataclass(frozen=True)
class Inspection:
    """Everything that was recorded about one compilation."""

    model: str
    """What the user called the model."""
    inputs: str
    """What it was captured with, such as `input_ids int64[8, 128]`."""
    graphs: tuple[InspectedGraph, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each step: capture, passes, errors."""
    notes: tuple[str, ...] = ()
    """What a reader should know: that weights were absent, why errors were not measured."""
    release: str = __version__

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able data, with its format and schema version."""
        return {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "release": self.release,
            "model": self.model,
            "inputs": self.inputs,
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "graphs": [
                {
                    "name": graph.name,
                    "history": graph.history.to_json(),
                    "layers": [asdict(layer) for layer in graph.layers],
                }
                for graph in self.graphs
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inspection:
        """The inspection that `to_json` wrote.

        Raises OptionError for data of another kind or schema version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise OptionError("this is no inspection: `mixq inspect MODEL --json FILE` writes one.")
        if data.get("schema") != SCHEMA_VERSION:
            raise OptionError(
                f"this inspection has schema version {data.get('schema')!r}, written by mixq-compile "
                f"{data.get('release', 'of an unknown release')}; this release ({__version__}) reads version "
                f"{SCHEMA_VERSION}. Inspect the model again."
            )
        return cls(
            model=data["model"],
            inputs=data["inputs"],
            graphs=tuple(
                InspectedGraph(
                    name=graph["name"],
                    history=History.from_json(graph["history"]),
                    layers=tuple(LayerSummary(**layer) for layer in graph["layers"]),
                )
                for graph in data["graphs"]
            ),
            seconds=dict(data["seconds"]),
            notes=tuple(data["notes"]),
            release=data["release"],
        )
