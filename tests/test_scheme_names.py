"""Names of schemes: their own, and those under which others know them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixq_compile as mixq
from mixq_compile.benchmarking.choices import parse_schemes
from mixq_compile.errors import OptionError
from mixq_compile.schemes.registry import ALIASES, accepted_names, get_scheme, scheme_names


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_scheme_itself(alias: str) -> None:
    assert get_scheme(alias) is get_scheme(ALIASES[alias])
    assert alias in accepted_names()
    assert alias not in scheme_names(), "listings show each scheme once"


def test_eetq_is_int8_weights_alone() -> None:
    assert get_scheme("eetq").name == "w8a16"
    model = mixq.quantize(nn.Sequential(nn.Linear(64, 64)), "eetq")
    assert model[0].scheme == get_scheme("w8a16")
    assert [linear.scheme for linear in mixq.report(model).quantized] == ["w8a16"]


def test_every_way_in_takes_an_alias() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    fast = torch.compile(
        model, backend="mixq", options={"scheme": "eetq", "layers": {"1": "eetq"}, "force": True}
    )
    with torch.no_grad():
        fast(torch.randn(8, 64))
    assert [linear.scheme for linear in mixq.report(model).quantized] == ["w8a16", "w8a16"]
    assert parse_schemes("eetq,w8a16") == ("w8a16",)
    assert parse_schemes("all") == scheme_names()


def test_an_unknown_name_lists_the_aliases_too() -> None:
    with pytest.raises(OptionError, match="eetq"):
        get_scheme("eetc")
