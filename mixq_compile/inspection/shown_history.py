"""A history with its views, for whoever holds one in Python."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mixq_compile.inspection.html import save_html
from mixq_compile.inspection.inspection import InspectedGraph, Inspection
from mixq_compile.inspection.text import print_history
from mixq_compile.pipeline import History


@dataclass
class ShownHistory(History):
    """What a pipeline did, as a value that can show itself."""

    model: str = ""
    """The class of the model, where it is known: the title of its report."""

    @classmethod
    def of(cls, history: History, model: str = "") -> ShownHistory:
        """The same history, with views."""
        return cls(history.pipeline, history.initial, history.records, model)

    def print(self) -> None:
        """Prints the table of passes to the terminal."""
        print_history(self)

    def save_html(self, path: str | os.PathLike[str], model: str = "") -> None:
        """Writes a report that a browser opens without a network; `model` is its title.

        Without one it is the class of the model.
        """
        save_html(Inspection(model or self.model, "", (InspectedGraph.of(self),)), Path(path))
