import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from throwaway_passes import REGISTRY, AnnotateLinears, NegateTwice

from mixq_compile.errors import OptionError
from mixq_compile.pipeline import Pipeline
from mixq_compile.pipeline.options import OptionType, format_value


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, REGISTRY)


def options_of(text: str) -> AnnotateLinears:
    (step,) = parse(text)
    assert isinstance(step, AnnotateLinears)
    return step


class TestReading:
    def test_passes_run_in_the_order_of_the_text(self) -> None:
        assert parse("annotate-linears,negate-twice").passes == (AnnotateLinears(), NegateTwice())

    def test_white_space_is_free(self) -> None:
        text = "\n annotate-linears{ limit=5\n  force=true } ,\n negate-twice\n"
        assert parse(text) == parse("annotate-linears{limit=5 force=true},negate-twice")

    @pytest.mark.parametrize(
        ("text", "name", "value"),
        [
            ("scheme=w4a4o16", "scheme", "w4a4o16"),
            ('scheme="two words"', "scheme", "two words"),
            ("scheme=none", "scheme", "none"),
            ('scheme=""', "scheme", ""),
            ("ignore=lm_head,model.layers.*.down", "ignore", ("lm_head", "model.layers.*.down")),
            ("ignore=", "ignore", ()),
            ('ignore=""', "ignore", ("",)),
            ('ignore="a,b",c', "ignore", ("a,b", "c")),
            ("ignore=a=b", "ignore", ("a=b",)),
            ("threshold=6", "threshold", 6.0),
            ("threshold=2.5e-3", "threshold", 0.0025),
            ("threshold=inf", "threshold", math.inf),
            ("threshold=-inf", "threshold", -math.inf),
            ("capacity=none", "capacity", None),
            ("capacity=32", "capacity", 32),
            ("force=true", "force", True),
            ("force=false", "force", False),
            ("label=none", "label", None),
            ('label="none"', "label", "none"),
            ("miss=lazy", "miss", "lazy"),
            ("layers=none", "layers", None),
            ("layers=", "layers", ()),
        ],
    )
    def test_each_type_of_option_has_a_spelling(self, text: str, name: str, value: object) -> None:
        read = getattr(options_of(f"annotate-linears{{{text}}}"), name)
        assert read == value
        assert type(read) is type(value)

    def test_the_name_of_a_pipeline_stands_for_its_passes(self) -> None:
        assert parse("usual") == parse("annotate-linears,negate-twice")
        assert str(parse("whole")) == "annotate-linears,negate-twice,lower-negations"
        assert Pipeline.named("whole", REGISTRY) == parse("usual,lower-negations")


class TestWriting:
    def test_only_options_that_differ_from_their_defaults_are_written(self) -> None:
        assert str(parse("annotate-linears{limit=3 scheme=w8a8o16}")) == "annotate-linears"

    def test_options_are_written_in_the_order_of_the_fields(self) -> None:
        text = "annotate-linears{force=true scheme=w8a16 ignore=a,b}"
        assert str(parse(text)) == "annotate-linears{scheme=w8a16 ignore=a,b force=true}"

    texts = st.text(max_size=12)
    steps = st.builds(
        AnnotateLinears,
        scheme=texts,
        ignore=st.lists(texts, max_size=3).map(tuple),
        threshold=st.floats(allow_nan=False),
        capacity=st.none() | st.integers(),
        limit=st.integers(),
        force=st.booleans(),
        label=st.none() | texts,
        miss=st.sampled_from(["exact", "lazy"]),
        ratio=st.none() | st.floats(allow_nan=False),
        layers=st.none() | st.lists(texts, max_size=2).map(tuple),
    )

    @settings(deadline=None, max_examples=150)
    @given(st.lists(steps, min_size=1, max_size=3).map(tuple))
    def test_what_is_written_is_read_back(self, steps: tuple[AnnotateLinears, ...]) -> None:
        pipeline = Pipeline(steps)
        assert parse(str(pipeline)) == pipeline
        assert str(parse(str(pipeline))) == str(pipeline)

    def test_not_a_number_is_written_too(self) -> None:
        step = options_of(AnnotateLinears(threshold=math.nan).spec())
        assert math.isnan(step.threshold)

    @pytest.mark.parametrize("word", ["none", "two words", "a,b", "{", "}", '"', "", "\t"])
    def test_a_text_that_would_be_misread_is_quoted(self, word: str) -> None:
        assert format_value(word).startswith('"')


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "position 1: expected the name of a pass, found the end."),
            ("negate-twice,", "position 14: expected the name of a pass, found the end."),
            ("negate-twice negate-twice", "position 14: expected ',' or the end, found 'n'."),
            ("annotate-linears{limit}", "expected '=' after the option 'limit', found '}'."),
            ("annotate-linears{limit=3", "expected an option (name=value) or '}', found the end."),
            ("annotate-linears{ignore=a,}", "expected an item of the list, found '}'."),
            ('annotate-linears{label="a}', "expected a space, ',' or '}'"),
            (r'annotate-linears{label="\q"}', "this is not a valid JSON string."),
            ("annotate-linears{=3}", "expected an option (name=value) or '}', found '='."),
            (
                "negate-twise",
                "unknown pass 'negate-twise'. Did you mean 'negate-twice'? Valid: annotate-linears,",
            ),
            ("usuall", "Did you mean 'usual'?"),
            (
                "annotate-linears{limt=3}",
                "unknown option of annotate-linears 'limt'. Did you mean 'limit'? Valid:",
            ),
            ("negate-twice{x=1}", "the pass 'negate-twice' has no options."),
            ("annotate-linears{limit=3 limit=4}", "the option 'limit' is given twice."),
            ("annotate-linears{limit=three}", "annotate-linears{limit=} takes an integer, not 'three'."),
            ("annotate-linears{limit=3.5}", "takes an integer, not '3.5'."),
            ("annotate-linears{limit=none}", "takes an integer, not 'none'."),
            ("annotate-linears{limit=}", "takes an integer, not ''."),
            ('annotate-linears{limit="3"}', "takes an integer"),
            ("annotate-linears{threshold=big}", "takes a number, not 'big'."),
            ("annotate-linears{capacity=x}", "takes an integer, or none, not 'x'."),
            ("annotate-linears{force=yes}", "takes true or false, not 'yes'."),
            ("annotate-linears{scheme=a,b}", "takes a text, not 'a,b'."),
            ("annotate-linears{miss=never}", "takes one of exact, lazy, not 'never'."),
            ("usual{limit=3}", "the pipeline 'usual' has no options."),
        ],
    )
    def test_a_text_that_cannot_be_read_says_why(self, text: str, expected: str) -> None:
        with pytest.raises(OptionError) as caught:
            parse(text)
        assert expected in str(caught.value)

    def test_the_place_is_shown(self) -> None:
        with pytest.raises(OptionError) as caught:
            parse("negate-twice,\n  annotate-linears{limt=3}")
        message, line, mark = str(caught.value).split("\n")
        assert message.startswith("pipeline text, position 34: ")
        assert line[mark.index("^") :] == "limt=3}"

    def test_an_unknown_named_pipeline_lists_them(self) -> None:
        with pytest.raises(OptionError, match=r"unknown pipeline 'jit'\. Valid: usual, whole"):
            Pipeline.named("jit", REGISTRY)


class TestOptions:
    def test_options_of_one_pass_can_be_changed(self) -> None:
        changed = parse("usual").with_options("annotate-linears", scheme="w8a8", ignore=["a"], threshold=5)
        assert str(changed) == "annotate-linears{scheme=w8a8 ignore=a threshold=5.0},negate-twice"

    @pytest.mark.parametrize(
        ("name", "options", "expected"),
        [
            ("lower-negations", {}, "unknown pass of this pipeline 'lower-negations'"),
            ("annotate-linears", {"shceme": "x"}, "Did you mean 'scheme'"),
            ("annotate-linears", {"limit": "3"}, "{limit=} takes an integer, not 3"),
            ("annotate-linears", {"limit": True}, "{limit=} takes an integer, not true"),
            ("annotate-linears", {"ignore": "a"}, "{ignore=} takes a list, not a"),
            ("annotate-linears", {"miss": "never"}, "takes one of exact, lazy, not never"),
        ],
    )
    def test_wrong_ones_are_refused(self, name: str, options: dict[str, Any], expected: str) -> None:
        with pytest.raises(OptionError) as caught:
            parse("usual").with_options(name, **options)
        assert expected in str(caught.value)

    @pytest.mark.parametrize("annotation", [list, dict[str, int], str | int, tuple[int, ...], object])
    def test_types_without_a_spelling_are_no_option_types(self, annotation: object) -> None:
        with pytest.raises(TypeError, match="an option is str"):
            OptionType.of(annotation)


class TestKey:
    def test_it_is_the_same_for_the_same_pipeline(self) -> None:
        assert parse("usual").uuid() == parse("annotate-linears,negate-twice").uuid()

    def test_it_covers_options_order_and_statistics(self) -> None:
        keys = {
            parse("usual").uuid(),
            parse("usual").uuid("statistics"),
            parse("negate-twice,annotate-linears").uuid(),
            parse("annotate-linears{limit=4},negate-twice").uuid(),
        }
        assert len(keys) == 4

    def test_it_covers_the_sources_of_the_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = parse("usual").uuid()
        monkeypatch.setattr("inspect.getsource", lambda module: "other")
        assert parse("usual").uuid() != before


def test_a_pass_is_a_value() -> None:
    assert AnnotateLinears(limit=4) == AnnotateLinears(limit=4)
    assert len({AnnotateLinears(), AnnotateLinears()}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        AnnotateLinears().limit = 5
