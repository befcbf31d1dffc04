"""Every scheme beside FP16 in the setting of the published table, and which orders hold in every model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mixq_compile.area import published
from mixq_compile.area.assumptions import DEFAULT, FOLDINGS, TECHNOLOGIES, Assumptions
from mixq_compile.area.linear_areas import ESTIMATES, LinearSize, linear_area

MUCH_SMALLER = 0.5
SIZE = LinearSize(
    published.OUT_FEATURES, published.IN_FEATURES, published.ROWS, published.HIGH_PRECISION_COLUMNS
)
"""The published setting; rank 32."""


@dataclass(frozen=True)
class Model:
    """One way to estimate: what area is counted in, and how side stages are folded."""

    technology: str
    folding: str

    def __str__(self) -> str:
        return f"{self.technology}, {self.folding}"


MODELS = tuple(Model(technology, folding) for technology in TECHNOLOGIES for folding in FOLDINGS)


@dataclass(frozen=True)
class Order:
    """A claim about relative areas."""

    claim: str
    holds: Callable[[Mapping[str, float]], bool]
    folding: str | None = None
    """Where it is claimed; None: everywhere."""


ORDERS = (
    Order("FP16 < AWQ", lambda area: area["awq"] > 1),
    Order("mxint2 < mxint4", lambda area: area["lqer_mxint2"] < area["lqer_mxint4"]),
    Order("LQER-MXINT < LQER-INT", lambda area: area["lqer_mxint4"] < area["lqer_int4"]),
    Order("LLM.int > FP16", lambda area: min(area["llm_int4"], area["llm_int8"]) > 1, folding="none"),
    Order(
        f"LQER-MXINT < {MUCH_SMALLER:g} × FP16",
        lambda area: area["lqer_mxint4"] < MUCH_SMALLER,
        folding="rate-matched",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Areas relative to FP16, by model and scheme."""

    assumptions: Assumptions
    fp16: dict[Model, float]
    """In each model's own unit."""
    relative: dict[Model, dict[str, float]]

    def surviving(self, order: Order) -> dict[Model, bool]:
        """Whether an order holds, in every model for which it is claimed."""
        return {
            model: order.holds(areas)
            for model, areas in self.relative.items()
            if order.folding in (None, model.folding)
        }

    def to_json(self) -> dict[str, Any]:
        """Everything compared, with the published column, as JSON-able data."""
        return {
            "setting": dataclasses.asdict(SIZE),
            "assumptions": {
                name: value
                for name, value in self.assumptions.to_json().items()
                if name not in ("technology", "folding")
            },
            "fp16": {str(model): area for model, area in self.fp16.items()},
            "relative": {str(model): areas for model, areas in self.relative.items()},
            "published": {
                "source": published.SOURCE,
                "setting": published.SETTING,
                "caveats": list(published.CAVEATS),
                "rows": [dataclasses.asdict(row) for row in published.TABLE],
            },
            "orders": {
                order.claim: {str(model): holds for model, holds in self.surviving(order).items()}
                for order in ORDERS
            },
        }


def compare(assumptions: Assumptions = DEFAULT) -> Comparison:
    """Estimates every scheme in every technology and with each folding, in the published setting."""
    fp16: dict[Model, float] = {}
    relative: dict[Model, dict[str, float]] = {}
    for model in MODELS:
        taken = dataclasses.replace(assumptions, technology=model.technology, folding=model.folding)  # type: ignore[arg-type]
        areas = {scheme: linear_area(SIZE, scheme, taken).total for scheme in ESTIMATES}
        fp16[model] = areas["fp16"]
        relative[model] = {scheme: area / areas["fp16"] for scheme, area in areas.items()}
    return Comparison(assumptions, fp16, relative)
