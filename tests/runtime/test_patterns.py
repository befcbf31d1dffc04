"""Patterns that name linears: one rule at every entrance, and a warning for each that means none."""

from __future__ import annotations

import warnings

import pytest
import torch
from compiling import FEATURES, compiled, rows
from torch import Tensor, nn

import mixq_compile as mixq
from mixq_compile.errors import OptionError
from mixq_compile.inspection.layers import layers_of, lies_in, matching


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {"up_proj": nn.Linear(FEATURES, FEATURES), "down_proj": nn.Linear(FEATURES, FEATURES)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


class Model(nn.Module):
    """Two layers: `model.layers.0.mlp.up_proj` and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2))})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model["layers"]:
            x = layer(x)
        return x


def model_of() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def left(entrance: str, **options: object) -> list[str]:
    """The linears that an entrance left alone."""
    if entrance == "export":
        _, history = mixq.compile(mixq.capture(model_of(), (rows(),)), "aot", force=True, **options)
        return [layer.fqn for layer in layers_of(history) if layer.skip is not None]
    made = mixq.quantize(model_of(), **options) if entrance == "quantize" else compiled(model_of(), **options)
    made(rows())
    return [linear.fqn for linear in mixq.report(made).skipped]


UP, DOWN = ([f"model.layers.{place}.mlp.{name}" for place in range(2)] for name in ("up_proj", "down_proj"))
PATTERNS = {
    "down_proj": DOWN,
    "mlp.down_proj": DOWN,
    "model.layers.0": [UP[0], DOWN[0]],
    "layers.1.mlp": [UP[1], DOWN[1]],
    "layers.*.up_proj": UP,
    "*.up_*": UP,
    "re:.*down_proj": DOWN,
    r"re:model\.layers\.[01]\.mlp\.up_proj": UP,
    UP[0]: [UP[0]],
}
ENTRANCES = pytest.mark.parametrize("entrance", ["backend", "quantize", "export"])


@ENTRANCES
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_ignored(pattern, entrance):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mixq: ignore")
        assert sorted(left(entrance, ignore=[pattern])) == sorted(PATTERNS[pattern])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_views_mean_the_same(pattern):
    names = [*UP, *DOWN]
    assert sorted(matching(names, pattern)) == sorted(PATTERNS[pattern])
    assert sorted(name for name in names if lies_in(name, pattern)) == sorted(PATTERNS[pattern])


@ENTRANCES
def test_what_layers_names(entrance):
    found = mixq.quantize(model_of(), layers={"mlp.down_proj": "w8a16", "re:.*up_proj": "w8a8"})
    assert [linear.scheme for linear in mixq.report(found).linears] == ["w8a8", "w8a16"] * 2


WRONG = ["donw_proj", "layers.0.down_proj", "re:down_proj", "*.gate_proj"]


@ENTRANCES
@pytest.mark.parametrize("option", ["ignore", "layers"])
@pytest.mark.parametrize("pattern", WRONG)
def test_a_pattern_without_a_match_warns(pattern, option, entrance):
    given = {"ignore": [pattern], "layers": {pattern: "w8a8"}}[option]
    with pytest.warns(UserWarning, match="none of the 4 linears") as caught:
        assert left(entrance, **{option: given}) == []
    told = [str(each.message) for each in caught if f"{option} holds {pattern!r}" in str(each.message)]
    assert len(told) == 1, [str(each.message) for each in caught]
    assert "none of the 4 linears" in told[0]


def test_the_nearest_name_is_told():
    with pytest.warns(UserWarning, match="Did you mean 'down_proj'"):
        mixq.quantize(model_of(), ignore=["donw_proj"])


def test_the_default_is_nobody_s_pattern():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mixq: ignore")
        mixq.quantize(model_of())
        mixq.quantize(model_of(), ignore=["lm_head", "down_proj"])


def test_a_wrong_expression_is_told():
    with pytest.raises(OptionError, match="is no regular expression"):
        mixq.quantize(model_of(), ignore=["re:("])
