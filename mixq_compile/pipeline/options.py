"""Values of options in the text of a pipeline.

    true  false  none  12  0.5  inf  word  "any text, as JSON writes it"  a,b,"c d"

A list is its items with commas between them and no spaces; an empty list is nothing at all
(`ignore=`). A word may hold anything but spaces, commas, braces and double quotes, and the word
`none` is written `"none"`.
"""

from __future__ import annotations

import json
import re
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

BARE = re.compile(r'[^\s,{}"]+')
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
NONE = "none"
_SCALARS = (str, int, float, bool)


@dataclass(frozen=True)
class Atom:
    """One word or quoted text."""

    text: str
    quoted: bool


@dataclass(frozen=True)
class OptionType:
    """The type of an option, from its field's annotation."""

    base: Any
    """str, int, float, bool or tuple."""
    optional: bool = False
    choices: tuple[str, ...] = ()
    or_text: bool = False
    """Whether a text that is no number is meant too."""

    @classmethod
    def of(cls, annotation: Any) -> OptionType:
        """The type that an annotation means. Raises TypeError for one that no option may have."""
        optional = False
        if get_origin(annotation) in (Union, types.UnionType):
            members = [member for member in get_args(annotation) if member is not types.NoneType]
            optional = len(members) < len(get_args(annotation))
            if set(members) == {float, str}:
                return cls(float, optional, or_text=True)
            annotation = members[0] if len(members) == 1 else None
        if annotation in _SCALARS:
            return cls(annotation, optional)
        if get_origin(annotation) is tuple and get_args(annotation) == (str, ...):
            return cls(tuple, optional)
        if get_origin(annotation) is Literal and all(type(item) is str for item in get_args(annotation)):
            return cls(str, optional, get_args(annotation))
        raise TypeError(
            "an option is str, int, float, bool, float | str, a Literal of strings, tuple[str, ...], "
            f"or one of these or None; not {annotation!r}."
        )

    def __str__(self) -> str:
        known = {str: "a text", int: "an integer", float: "a number", bool: "true or false", tuple: "a list"}
        text = f"one of {', '.join(self.choices)}" if self.choices else known[self.base]
        text += " or a text" if self.or_text else ""
        return f"{text}, or {NONE}" if self.optional else text

    def parse(self, atoms: list[Atom]) -> Any:
        """The value that these atoms mean. Raises ValueError for any that do not fit."""
        if self.optional and atoms == [Atom(NONE, quoted=False)]:
            return None
        if self.base is tuple:
            return tuple(atom.text for atom in atoms)
        if len(atoms) != 1:
            raise ValueError
        (atom,) = atoms
        if self.base is str:
            return self.check(atom.text)
        if atom.quoted:
            if self.or_text:
                return atom.text
            raise ValueError
        if self.base is bool:
            if atom.text not in ("true", "false"):
                raise ValueError
            return atom.text == "true"
        try:
            return self.base(atom.text)
        except ValueError:
            if not self.or_text:
                raise
            return atom.text

    def check(self, value: Any) -> Any:
        """A value given in Python; an int becomes a float and a list a tuple where those are meant.

        Raises ValueError if it does not fit.
        """
        if value is None and self.optional:
            return None
        if self.base is tuple and isinstance(value, (list, tuple)) and all(type(v) is str for v in value):
            return tuple(value)
        if self.base is float and type(value) is int:
            return float(value)
        if self.or_text and type(value) is str:
            return value
        if type(value) is not self.base or (self.choices and value not in self.choices):
            raise ValueError
        return value


def format_value(value: Any) -> str:
    """A value as the text of a pipeline writes it."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(format_value(item) for item in value)
    if isinstance(value, str):
        return value if BARE.fullmatch(value) and value != NONE else json.dumps(value)
    return repr(value)
