"""What a pipeline did, as a value; terminal, HTML and JSON are views of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mixq_compile.errors import OptionError
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import Snapshot
from mixq_compile.ir.verify import Violation
from mixq_compile.pipeline.passes import Decision

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    index: int
    """Its place in the pipeline, from 1."""
    spec: str
    milliseconds: float
    """Time of the pass alone, without verification and snapshots."""
    diff: GraphDiff | None
    """None where the run took no snapshots."""
    decisions: tuple[Decision, ...] = ()
    violations: tuple[Violation, ...] = ()
    stopped: bool = False
    """True where the fuel ended in this pass."""

    def count(self, verdict: str) -> int:
        """How many decisions have this verdict."""
        return sum(decision.verdict == verdict for decision in self.decisions)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-able data."""
        return {
            "index": self.index,
            "spec": self.spec,
            "milliseconds": self.milliseconds,
            "diff": self.diff.to_json() if self.diff is not None else None,
            "decisions": [asdict(decision) for decision in self.decisions],
            "violations": [asdict(violation) for violation in self.violations],
            "stopped": self.stopped,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PassRecord:
        """The record that `to_json` wrote."""
        return cls(
            index=data["index"],
            spec=data["spec"],
            milliseconds=data["milliseconds"],
            diff=GraphDiff.from_json(data["diff"]) if data["diff"] is not None else None,
            decisions=tuple(Decision(**decision) for decision in data["decisions"]),
            violations=tuple(Violation(**violation) for violation in data["violations"]),
            stopped=data["stopped"],
        )


@dataclass
class History:
    """The graph before the first pass, and what each pass did; grows while a pipeline runs."""

    pipeline: str
    """The text of the pipeline."""
    initial: Snapshot | None
    """The graph as it was captured; None where the run took no snapshots."""
    records: list[PassRecord] = field(default_factory=list)

    def decisions(self, fqn: str | None = None) -> list[Decision]:
        """All decisions in order, or those about one layer."""
        found = [decision for record in self.records for decision in record.decisions]
        return found if fqn is None else [decision for decision in found if decision.fqn == fqn]

    def snapshot(self, index: int) -> Snapshot:
        """The graph behind the pass of this index; 0 is the captured graph.

        Raises LookupError where the run took no snapshots or has no such pass.
        """
        if self.initial is None:
            raise LookupError("the run took no snapshots; run the pipeline with snapshots=True.")
        if not 0 <= index <= len(self.records):
            raise LookupError(f"the run has passes 1 to {len(self.records)}, and no {index}.")
        snapshot = self.initial
        for record in self.records[:index]:
            if record.diff:
                snapshot = record.diff.apply(snapshot)
        return snapshot

    @property
    def final(self) -> Snapshot:
        """The graph behind the last pass."""
        return self.snapshot(len(self.records))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able data, with its schema version."""
        return {
            "schema": SCHEMA_VERSION,
            "pipeline": self.pipeline,
            "initial": self.initial.to_json() if self.initial is not None else None,
            "records": [record.to_json() for record in self.records],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> History:
        """The history that `to_json` wrote. Raises OptionError for another schema version."""
        if data.get("schema") != SCHEMA_VERSION:
            raise OptionError(
                f"this history has schema version {data.get('schema')!r}; this release reads version "
                f"{SCHEMA_VERSION}. Record it again."
            )
        return cls(
            pipeline=data["pipeline"],
            initial=Snapshot.from_json(data["initial"]) if data["initial"] is not None else None,
            records=[PassRecord.from_json(record) for record in data["records"]],
        )
