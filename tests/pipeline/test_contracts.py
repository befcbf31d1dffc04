import pytest
from throwaway_passes import REGISTRY

from mixq_compile.errors import PipelineError
from mixq_compile.pipeline import Pipeline


def build(text: str, established: tuple[str, ...] = ()) -> Pipeline:
    return Pipeline.parse(text, REGISTRY).build(established)


def test_a_pipeline_whose_requirements_are_met_is_built() -> None:
    assert str(build("annotate-linears,negate-twice")) == "annotate-linears,negate-twice"


def test_facts_may_hold_from_the_beginning() -> None:
    build("negate-twice", established=("named",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("negate-twice", "pass 1, negate-twice, requires 'named': no pass of the pipeline establishes it"),
        ("negate-twice,annotate-linears", "annotate-linears establishes it, and comes only later"),
        ("annotate-linears,forget-names,negate-twice", "pass 2, forget-names, has undone it"),
    ],
)
def test_a_requirement_that_is_not_met_says_what_to_do(text: str, expected: str) -> None:
    with pytest.raises(PipelineError) as caught:
        build(text)
    assert expected in str(caught.value)
    assert text in str(caught.value)


def test_all_of_them_are_listed_at_once() -> None:
    with pytest.raises(PipelineError) as caught:
        build("lower-negations,negate-twice")
    assert "2 requirement(s)" in str(caught.value)
    assert "pass 1, lower-negations, requires 'negated'" in str(caught.value)
    assert "pass 2, negate-twice, requires 'named'" in str(caught.value)


def test_a_fact_can_be_established_again() -> None:
    build("annotate-linears,forget-names,annotate-linears,negate-twice")
