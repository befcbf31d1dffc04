"""docs/options.md names every option with its default and says what the code says of it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mixq_compile.cli.passes import field_documentation
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.quantize import ALLOWED

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "options.md"
ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| `(?P<default>[^`]*)` \| (?P<swap>q?) *\| (?P<text>.*) \|$", re.MULTILINE
)
ROWS = {row["name"]: row for row in ROW.finditer(DOCUMENT.read_text())}
FIELDS = {entry.name: entry for entry in dataclasses.fields(MixqOptions)}


def test_every_option_has_a_row_in_order():
    assert list(ROWS) == list(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_default_and_text_are_those_of_the_code(name):
    field, row = FIELDS[name], ROWS[name]
    default = field.default if field.default is not dataclasses.MISSING else {}
    assert row["default"] == repr(default)
    assert row["text"] == field_documentation(MixqOptions)[name].replace("|", "/")


def test_options_of_a_swap_are_marked():
    marked = {name for name, row in ROWS.items() if row["swap"]}
    assert marked == {"scheme", *ALLOWED}
