"""What a pass is: a frozen dataclass that yields a decision before each rewrite.

The protocol is *yield, then rewrite*: `run` is a generator, and an `applied` decision announces the
rewrite that follows it. The pipeline closes the generator where its fuel is spent, so that the rewrite
does not happen; a pass that must tidy up does so in a `finally`. Timing, fuel, verification, snapshots
and the origin of new nodes are the pipeline's work and not the pass's.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.fx import Node

from mixq_compile.errors import PipelineError
from mixq_compile.ir.annotations import Annotations, as_json
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.ir.names import location, module_fqn
from mixq_compile.pipeline.options import format_value

Verdict = Literal["applied", "skipped", "noted"]


@dataclass(frozen=True)
class Decision:
    """What a pass decided about one node, and why."""

    node: str
    """Name of the node; empty for the graph as a whole."""
    fqn: str
    """The layer it belongs to."""
    verdict: Verdict
    """`applied` (a rewrite or annotation that fuel pays for), `skipped`, or `noted` (nothing to do)."""
    reason: str
    details: dict[str, Any] = field(default_factory=dict)
    """JSON: figures, rejected alternatives."""
    where: str = ""
    """The line of the model's Python code."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "details", as_json(self.details, "details of a decision"))

    @classmethod
    def _about(
        cls, node: Node, verdict: Verdict, reason: str, fqn: str | None, details: dict[str, Any] | None
    ) -> Decision:
        name = fqn or Annotations(node).fqn or module_fqn(node)
        return cls(node.name, name, verdict, reason, details or {}, location(node))

    @classmethod
    def applied(
        cls, node: Node, reason: str, *, fqn: str | None = None, details: dict[str, Any] | None = None
    ) -> Decision:
        """The rewrite that the pass performs right after yielding this."""
        return cls._about(node, "applied", reason, fqn, details)

    @classmethod
    def skipped(
        cls, node: Node, reason: str, *, fqn: str | None = None, details: dict[str, Any] | None = None
    ) -> Decision:
        """A node that the pass would change but leaves alone, and why."""
        return cls._about(node, "skipped", reason, fqn, details)

    @classmethod
    def noted(
        cls, node: Node, reason: str, *, fqn: str | None = None, details: dict[str, Any] | None = None
    ) -> Decision:
        """Something worth recording that changes nothing."""
        return cls._about(node, "noted", reason, fqn, details)


class Fuel:
    """How many rewrites are allowed: bisecting the number finds the rewrite that breaks a model."""

    def __init__(self, rewrites: int | None = None) -> None:
        """Fuel for this many rewrites; None: without limit."""
        self.rewrites = rewrites
        self.spent = 0

    def spend(self) -> bool:
        """Pays for one rewrite. False where nothing is left."""
        if self.rewrites is not None and self.spent >= self.rewrites:
            return False
        self.spent += 1
        return True


class WeightProvider(Protocol):
    """What passes ask of the store of packed weights; passes know no more of it."""

    def prepare(self, weights: Sequence[tuple[Tensor, Any]], keeps_originals: bool) -> None:
        """Checks the memory that packing these parameters takes, before any is packed."""

    def pack(
        self, weight: Tensor, scheme: Any, dtype: Any, transposed: bool = False, statistics: Any = None
    ) -> Any:
        """The packed form of a parameter."""

    def derive(self, weight: Tensor, *steps: Any) -> Tensor:
        """A parameter, or what was derived from one, after more steps; follows when it is written."""

    def choose(self, weights: Sequence[Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gave when it was first asked for by this key and exactly these parameters."""

    def state(self, weights: Sequence[Tensor], *arguments: Any, **options: Any) -> Any:
        """The outlier state of the value that exactly these parameters read."""

    def fill(self, packed: Any, weight: Tensor, state: Any) -> None:
        """Fetches the columns that a state knows into a packed weight."""

    def bind(self, kept: Tensor, bound: Tensor) -> None:
        """Makes one state buffer of a module share the storage of another's."""

    def is_released(self, weight: Tensor) -> bool:
        """True where a parameter's storage has been freed and only its packed form is left."""


@dataclass(frozen=True)
class PassContext:
    """What a run gives its passes beside the graph."""

    stats: Any = None
    """Calibration statistics, or None."""
    weights: WeightProvider | None = None
    """None where the pipeline packs nothing."""
    fuel: Fuel = field(default_factory=Fuel)

    def store(self, step: Pass) -> WeightProvider:
        """The store of packed weights, for a pass that needs it. Raises PipelineError where there is none."""
        if self.weights is None:
            raise PipelineError(
                f"{step.name} needs a store of packed weights and outlier states, and this run has no store "
                "for them: give PassContext a `weights`."
            )
        return self.weights


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes: a frozen dataclass whose fields are its options, each with a default.

    Options are str, int, float, bool, a `Literal` of strings, `tuple[str, ...]`, or one of these or
    None.
    """

    name: ClassVar[str]
    """In kebab-case; the module's name with `-` for `_`."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """Facts that an earlier pass must have established."""
    establishes: ClassVar[frozenset[str]] = frozenset()
    """Facts that hold afterwards."""
    invalidates: ClassVar[frozenset[str]] = frozenset()
    """Facts that hold no longer."""
    spends_fuel: ClassVar[bool] = True
    """False for a lowering that must be completed once it has begun."""

    @abstractmethod
    def run(self, graph: CapturedGraph, context: PassContext) -> Iterator[Decision]:
        """Rewrites or annotates the graph in place; yields each decision before acting on it."""

    def spec(self) -> str:
        """The pass as a pipeline writes it, with the options that differ from their defaults."""
        options = [
            f"{option.name}={format_value(getattr(self, option.name))}"
            for option in dataclasses.fields(self)
            if format_value(getattr(self, option.name)) != format_value(option.default)
        ]
        return f"{self.name}{{{' '.join(options)}}}" if options else self.name
