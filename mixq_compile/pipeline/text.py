"""The text of a pipeline: `name{option=value option=value},name`, white space wherever it reads well."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from mixq_compile.errors import OptionError
from mixq_compile.pipeline.options import BARE, QUOTED, Atom

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_KEY = re.compile(r"[A-Za-z_]\w*")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class OptionText:
    """One `name=value` of a pass."""

    name: str
    atoms: tuple[Atom, ...]
    position: int


@dataclass(frozen=True)
class PassText:
    """One pass of a pipeline's text."""

    name: str
    options: tuple[OptionText, ...]
    position: int


def error_at(text: str, position: int, message: str) -> OptionError:
    """An error that shows the place in a pipeline's text."""
    line = text.rfind("\n", 0, position) + 1
    shown = text[line:].split("\n", 1)[0]
    column = position - line
    begin = max(0, column - 60)
    excerpt = shown[begin : column + 40]
    return OptionError(
        f"pipeline text, position {position + 1}: {message}\n  {excerpt}\n  {' ' * (column - begin)}^"
    )


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.position)
        self.position = match.end() if match else self.position

    def take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match.group()

    def accept(self, character: str) -> bool:
        found = self.text.startswith(character, self.position)
        self.position += len(character) if found else 0
        return found

    def at_end(self) -> bool:
        return self.position >= len(self.text)

    def expected(self, what: str) -> OptionError:
        found = repr(self.text[self.position]) if not self.at_end() else "the end"
        return error_at(self.text, self.position, f"expected {what}, found {found}.")

    def pass_text(self) -> PassText:
        self.skip_space()
        position = self.position
        name = self.take(_NAME)
        if name is None:
            raise self.expected("the name of a pass")
        options: list[OptionText] = []
        if self.accept("{"):
            self.skip_space()
            while not self.accept("}"):
                options.append(self.option_text())
                self.skip_space()
        self.skip_space()
        return PassText(name, tuple(options), position)

    def option_text(self) -> OptionText:
        position = self.position
        name = self.take(_KEY)
        if name is None:
            raise self.expected("an option (name=value) or '}'")
        if not self.accept("="):
            raise self.expected(f"'=' after the option {name!r}")
        atoms: list[Atom] = []
        first = self.atom()
        if first is not None:
            atoms.append(first)
            while self.accept(","):
                following = self.atom()
                if following is None:
                    raise self.expected("an item of the list")
                atoms.append(following)
        if not self.at_end() and self.text[self.position] != "}" and not self.text[self.position].isspace():
            raise self.expected("a space, ',' or '}'")
        return OptionText(name, tuple(atoms), position)

    def atom(self) -> Atom | None:
        position = self.position
        quoted = self.take(QUOTED)
        if quoted is not None:
            try:
                return Atom(json.loads(quoted), quoted=True)
            except ValueError:
                raise error_at(self.text, position, "this is not a valid JSON string.") from None
        bare = self.take(BARE)
        return None if bare is None else Atom(bare, quoted=False)


def parse_text(text: str) -> list[PassText]:
    """The passes of a pipeline's text. Raises OptionError that shows where it cannot be read."""
    scanner = _Scanner(text)
    passes = [scanner.pass_text()]
    while scanner.accept(","):
        passes.append(scanner.pass_text())
    if not scanner.at_end():
        raise scanner.expected("',' or the end")
    return passes
