"""From options to a pipeline: what is told to which pass."""

from __future__ import annotations

import pytest
from linear_models import statistics

from mixq_compile.errors import OptionError
from mixq_compile.pipeline import Pipeline
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.plan import pipeline_for


def specs(**options: object) -> dict[str, str]:
    """The passes that have other options than in `jit`, by name."""
    chosen = MixqOptions.from_user(options=options)
    plain = {step.spec() for step in Pipeline.named("jit")}
    return {step.name: step.spec() for step in pipeline_for(chosen, "jit") if step.spec() not in plain}


def test_default_options_are_the_named_pipeline() -> None:
    assert specs() == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scheme": "w8a8"}, {"select-scheme": "select-scheme{default=w8a8}"}),
        ({"force": True}, {"select-scheme": "select-scheme{force=true}"}),
        ({"ignore": []}, {"select-scheme": "select-scheme{ignore=}"}),
        ({"layers": {"a.*": "w8a8"}}, {"select-scheme": "select-scheme{layers=a.*=w8a8}"}),
        (
            {"threshold": 3, "capacity": 32, "miss": "lazy"},
            {"select-scheme": "select-scheme{threshold=3.0 capacity=32 miss=lazy}"},
        ),
        ({"release_weights": True}, {"rewrite-mixed-linear": "rewrite-mixed-linear{originals=false}"}),
        (
            {"merge_siblings": "always"},
            {
                "select-scheme": "select-scheme{merge_siblings=always}",
                "merge-siblings": "merge-siblings{when=always}",
            },
        ),
        (
            {"merge_siblings": "never"},
            {
                "select-scheme": "select-scheme{merge_siblings=never}",
                "merge-siblings": "merge-siblings{when=never}",
            },
        ),
        ({"batch_invariant": True}, {"rewrite-mixed-linear": "rewrite-mixed-linear{batch_invariant=true}"}),
        (
            {"kernel": "ref"},
            {
                "select-scheme": "select-scheme{kernel=ref}",
                "rewrite-mixed-linear": "rewrite-mixed-linear{kernel=ref}",
                "merge-siblings": "merge-siblings{kernel=ref}",
                "select-kernels": "select-kernels{kernel=ref}",
            },
        ),
    ],
)
def test_options_are_told_to_the_passes(options: dict[str, object], expected: dict[str, str]) -> None:
    assert specs(**options) == expected


def test_the_text_names_the_statistics() -> None:
    stats = statistics({"a": {3: 9.0}})
    assert specs(stats=stats) == {"annotate-outliers": f"annotate-outliers{{stats={stats.sha256()[:16]}}}"}
    other = statistics({"a": {3: 9.5}})
    assert specs(stats=stats) != specs(stats=other)


def test_the_users_pipeline_keeps_what_its_text_says() -> None:
    text = "canonicalize-linear,select-scheme{default=w8a8 ignore=up_proj},rewrite-mixed-linear"
    assert str(pipeline_for(MixqOptions(pipeline=text), "jit")) == text
    assert "force=true" in str(pipeline_for(MixqOptions(pipeline=text, force=True), "jit"))


def test_passes_that_a_pipeline_lacks_are_told_nothing() -> None:
    options = MixqOptions(pipeline="strip-guards", scheme="w8a8", release_weights=True)
    assert str(pipeline_for(options, "jit")) == "strip-guards"


def test_an_unknown_pipeline_lists_the_named_ones() -> None:
    with pytest.raises(OptionError, match="jit"):
        MixqOptions(pipeline="jitt")
