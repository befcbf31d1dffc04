"""Options: every wrong one is an error that names what is wrong, where, and what would be right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import block, rows
from linear_models import statistics

from mixq_compile.errors import OptionError, PipelineError, StatisticsError
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.scheme import OutlierPolicy
from mixq_compile.schemes.registry import get_scheme

STATS = statistics({"up_proj": {3: 9.0}})

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"treshold": 6.0}, "unknown option 'treshold'. Did you mean 'threshold'?"),
    "unknown scheme": ({"scheme": "w8a8o61"}, "unknown scheme 'w8a8o61'. Did you mean 'w8a8o16'?"),
    "unknown policy": ({"miss": "exactly"}, "unknown miss 'exactly'. Did you mean 'exact'?"),
    "unknown kernel": ({"kernel": "triton"}, "unknown kernel 'triton'."),
    "unknown lowering": ({"lowering": "inducter"}, "Did you mean 'inductor'?"),
    "unknown mode": ({"mode": "reduce-overheads"}, "Did you mean 'reduce-overhead'?"),
    "unknown on_error": ({"on_error": "ignore"}, "unknown on_error 'ignore'. Valid: fallback, raise."),
    "zero threshold": ({"threshold": 0}, "threshold must be above 0, not 0"),
    "negative threshold": ({"threshold": -6.0}, "threshold must be above 0, not -6.0"),
    "threshold NaN": ({"threshold": math.nan}, "threshold must be above 0, not nan"),
    "threshold text": (
        {"threshold": "6"},
        "threshold must be a number, or a multiple of the row's mean magnitude such as '8x', not '6'",
    ),
    "threshold bool": (
        {"threshold": True},
        "threshold must be a number, or a multiple of the row's mean magnitude such as '8x', not True",
    ),
    "odd capacity": ({"capacity": 100}, "capacity must be a positive multiple of 16, not 100"),
    "zero capacity": ({"capacity": 0}, "capacity must be a positive multiple of 16, not 0"),
    "fractional capacity": ({"capacity": 16.0}, "capacity must be a positive multiple of 16, not 16.0"),
    "stats of another type": ({"stats": {"up_proj": 9.0}}, "not dict"),
    "static without stats": ({"miss": "static"}, "'static' takes its outlier columns from calibration"),
    "switch": ({"force": "yes"}, "force must be True or False, not 'yes'"),
    "switch as number": ({"release_weights": 1}, "release_weights must be True or False, not 1"),
    "ignore": ({"ignore": [1]}, "ignore takes names of linears"),
    "layers": ({"layers": ["up_proj"]}, "layers takes {pattern: scheme}"),
    "layers with unknown scheme": ({"layers": {"up_proj": "int8"}}, "unknown scheme 'int8'"),
    "pipeline with unknown pass": ({"pipeline": "select-schema"}, "Did you mean 'select-scheme'?"),
    "freed weights at 4 bit": ({"scheme": "w4a4o16", "release_weights": True}, "4-bit codes are too coarse"),
    "freed weights of a layer": ({"layers": {"a": "w4a8o16"}, "release_weights": True}, "w4a8o16 needs them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case: str) -> None:
    options, message = WRONG[case]
    with pytest.raises(OptionError) as caught:
        MixqOptions.from_user(options=options)
    assert message in str(caught.value)


def test_an_error_lists_every_valid_name() -> None:
    with pytest.raises(OptionError, match="Valid: exact, frozen, lazy, per_call, static"):
        MixqOptions(miss="never")


def test_a_pipeline_whose_contracts_are_not_met_is_refused() -> None:
    with pytest.raises(PipelineError, match="fuse-epilogue, requires 'mixed-linears'"):
        MixqOptions(pipeline="fuse-epilogue")


def test_the_error_reaches_the_user_of_torch_compile() -> None:
    fast = torch.compile(block(), backend="mixq", options={"scheme": "w8a8o61"})
    with pytest.raises(Exception, match="Did you mean 'w8a8o16'") as caught:
        fast(rows())
    assert isinstance(caught.value.__cause__ or getattr(caught.value, "inner_exception", None), OptionError)


def test_modes_may_come_both_ways_but_must_agree() -> None:
    assert MixqOptions.from_user("reduce-overhead").mode == "reduce-overhead"
    assert MixqOptions.from_user(None, {"mode": "max-autotune"}).mode == "max-autotune"
    assert MixqOptions.from_user("default", {"mode": "default"}).mode == "default"
    with pytest.raises(
        OptionError, match="the mode is given twice, as 'default' and as option 'reduce-overhead'"
    ):
        MixqOptions.from_user("default", {"mode": "reduce-overhead"})


def test_a_mode_becomes_inductors_configuration() -> None:
    assert MixqOptions(mode="reduce-overhead").inductor_patches() == {"triton.cudagraphs": True}
    both = MixqOptions(mode="reduce-overhead", inductor={"max_autotune": True})
    assert both.inductor_patches() == {"triton.cudagraphs": True, "max_autotune": True}
    assert MixqOptions().inductor_patches() == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [("a,b", ("a", "b")), (["a", "b"], ("a", "b")), (("a",), ("a",)), ("", ()), ([], ())],
)
def test_ignore_is_a_list_or_a_text(given: Any, expected: tuple[str, ...]) -> None:
    assert MixqOptions.from_user(options={"ignore": given}).ignore == expected


@pytest.mark.parametrize("given", [{"a.*": "w8a8"}, [("a.*", "w8a8")], (["a.*", "w8a8"],)])
def test_layers_are_a_mapping_or_pairs(given: Any) -> None:
    assert MixqOptions.from_user(options={"layers": given}).layers == (("a.*", "w8a8"),)


def test_statistics_are_given_or_loaded(tmp_path: Path) -> None:
    assert MixqOptions.from_user(options={"stats": STATS}).stats is STATS
    STATS.save(tmp_path / "stats.safetensors")
    loaded = MixqOptions.from_user(options={"stats": str(tmp_path / "stats.safetensors")}).stats
    assert loaded is not None
    assert loaded.sha256() == STATS.sha256()
    assert MixqOptions.from_user(options={"stats": None}).stats is None


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file at all"])
def test_missing_and_corrupt_statistics_name_the_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "stats.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StatisticsError, match=r"stats\.safetensors"):
        MixqOptions.from_user(options={"stats": path})


def test_static_is_allowed_with_statistics_or_without_outliers() -> None:
    assert MixqOptions(miss="static", stats=STATS).quant_scheme.outliers == OutlierPolicy(miss="static")
    assert MixqOptions(miss="static", scheme="w8a8").quant_scheme.outliers is None


def test_freeing_4_bit_weights_is_allowed_with_fixed_columns() -> None:
    for miss in ("static", "frozen"):
        MixqOptions(scheme="w4a4o16", release_weights=True, stats=STATS, miss=miss)


def test_a_registered_scheme_may_be_given_itself_but_not_a_changed_one() -> None:
    assert MixqOptions.from_user(options={"scheme": get_scheme("w8a8")}).scheme == "w8a8"
    with pytest.raises(
        OptionError, match=r"another scheme is called .* threshold, capacity and miss as options"
    ):
        MixqOptions.from_user(options={"scheme": get_scheme("w8a8o16").with_outliers(threshold=3.0)})


def test_outlier_options_are_applied_to_the_scheme() -> None:
    scheme = MixqOptions(threshold=3.0, capacity=32, miss="lazy").quant_scheme
    assert scheme.outliers == OutlierPolicy(threshold=3.0, capacity=32, miss="lazy")
