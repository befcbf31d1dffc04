"""A pipeline: passes in order, which a text writes and reads."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import ContractError, OptionError, unknown_name
from mixq_compile.ir.graph import CapturedGraph
from mixq_compile.pipeline.facts import declared_facts, undeclared
from mixq_compile.pipeline.history import History
from mixq_compile.pipeline.observers import Verification
from mixq_compile.pipeline.options import format_value
from mixq_compile.pipeline.passes import Pass, PassContext
from mixq_compile.pipeline.registry import PassRegistry, default_registry, option_types
from mixq_compile.pipeline.runner import run_passes
from mixq_compile.pipeline.text import PassText, error_at, parse_text


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run; `str` writes the text that `parse` reads."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str, registry: PassRegistry | None = None) -> Pipeline:
        """The pipeline that a text means; the name of a named pipeline stands for its passes.

        Raises OptionError that shows the place, and lists what would be valid there.
        """
        registry = registry or default_registry()
        return cls(tuple(_parse(text, registry, within=())))

    @classmethod
    def named(cls, name: str, registry: PassRegistry | None = None) -> Pipeline:
        """One of the pipelines that have names. Raises OptionError that lists them."""
        registry = registry or default_registry()
        if name not in registry.pipelines():
            raise unknown_name("pipeline", name, registry.pipelines())
        return cls.parse(name, registry)

    def __str__(self) -> str:
        return ",".join(step.spec() for step in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def with_options(self, name: str, **options: Any) -> Pipeline:
        """The pipeline with these options of one pass, wherever it stands in it.

        Raises OptionError for a pass that is not in it, an unknown option or a wrong value.
        """
        if name not in {step.name for step in self.passes}:
            raise unknown_name("pass of this pipeline", name, {step.name for step in self.passes})
        return Pipeline(
            tuple(_with_options(step, options) if step.name == name else step for step in self.passes)
        )

    def build(self, established: Iterable[str] = ()) -> Pipeline:
        """Checks every pass's requirements; returns the pipeline itself.

        Raises ContractError that lists all that are not met, and for a fact that nothing declares.
        `established` are facts that hold before the first pass.
        """
        problems: list[str] = []
        facts = set(established)
        self._check_facts_are_declared()
        lost: dict[str, str] = {}
        for index, step in enumerate(self.passes, 1):
            for fact in sorted(step.requires - facts):
                problems.append(f"  pass {index}, {step.name}, requires {fact!r}: {self._remedy(fact, lost)}")
            facts = (facts - step.invalidates) | step.establishes
            lost |= dict.fromkeys(step.invalidates, f"pass {index}, {step.name},")
        if problems:
            listed = "\n".join(problems)
            raise ContractError(
                f"{len(problems)} requirement(s) of this pipeline are not met:\n{listed}\n{self}"
            )
        return self

    def _check_facts_are_declared(self) -> None:
        """A name without a predicate is a claim that nobody checks, or a misspelt one."""
        for index, step in enumerate(self.passes, 1):
            for name in undeclared(step.requires | step.establishes | step.invalidates):
                raise ContractError(
                    f"pass {index}, {step.name}: {unknown_name('fact', name, declared_facts())} Declare a "
                    "fact of your own with `mixq_compile.pipeline.fact`, beside the pass that establishes it."
                )

    def _remedy(self, fact: str, lost: dict[str, str]) -> str:
        if fact in lost:
            return f"{lost[fact]} has undone it; put this pass before that one."
        later = [step.name for step in self.passes if fact in step.establishes]
        if later:
            return f"{later[0]} establishes it, and comes only later; put it before this pass."
        return "no pass of the pipeline establishes it; add one that does, before this pass."

    def uuid(self, extra: str = "") -> str:
        """A key of everything that decides the result: text, sources of the passes, release, `extra`."""
        digest = hashlib.sha256()
        for part in (str(self), _release(), extra):
            digest.update(part.encode() + b"\0")
        for module in sorted({type(step).__module__ for step in self.passes}):
            digest.update(_source(module).encode() + b"\0")
        return digest.hexdigest()

    def run(
        self,
        graph: CapturedGraph,
        context: PassContext | None = None,
        *,
        verify: Verification = "incremental",
        snapshots: bool = True,
    ) -> History:
        """Rewrites the graph in place and returns what happened.

        `verify`: check what each pass touched (incremental), everything behind each pass (full), or
        nothing (off). Raises ContractError where requirements are not met, PassError where a pass
        fails, PassVerificationError where one leaves a graph that does not hold; the last two carry
        the history up to then.
        """
        self.build()
        return run_passes(self.passes, str(self), graph, context or PassContext(), verify, snapshots)


def _parse(text: str, registry: PassRegistry, within: tuple[str, ...]) -> Iterator[Pass]:
    for written in parse_text(text):
        named = registry.pipelines()
        if written.name in named and written.name not in within:
            if written.options:
                raise error_at(text, written.position, f"the pipeline {written.name!r} has no options.")
            yield from _parse(named[written.name], registry, (*within, written.name))
        else:
            yield _parse_pass(text, written, registry)


def _parse_pass(text: str, written: PassText, registry: PassRegistry) -> Pass:
    if written.name not in registry.pass_names():
        valid = (*registry.pass_names(), *registry.pipelines())
        raise error_at(text, written.position, str(unknown_name("pass", written.name, valid)))
    kind = registry.get_pass(written.name)
    known = option_types(kind)
    values: dict[str, Any] = {}
    for option in written.options:
        if option.name not in known:
            message = _unknown_option(written.name, option.name, known)
            raise error_at(text, option.position, message)
        if option.name in values:
            raise error_at(text, option.position, f"the option {option.name!r} is given twice.")
        try:
            values[option.name] = known[option.name].parse(list(option.atoms))
        except ValueError:
            expected = f"{written.name}{{{option.name}=}} takes {known[option.name]}"
            given = ",".join(atom.text for atom in option.atoms)
            raise error_at(text, option.position, f"{expected}, not {given!r}.") from None
    return kind(**values)


def _unknown_option(name: str, option: str, known: Iterable[str]) -> str:
    if not list(known):
        return f"the pass {name!r} has no options."
    return str(unknown_name(f"option of {name}", option, known))


def _with_options(step: Pass, options: dict[str, Any]) -> Pass:
    known = option_types(type(step))
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise OptionError(_unknown_option(step.name, name, known))
        try:
            checked[name] = known[name].check(value)
        except ValueError:
            raise OptionError(
                f"{step.name}{{{name}=}} takes {known[name]}, not {format_value(value)}."
            ) from None
    return dataclasses.replace(step, **checked)


def _release() -> str:
    try:
        return importlib.metadata.version("mixq-compile")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return module
