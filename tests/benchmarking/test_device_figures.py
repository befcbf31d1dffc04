import pytest
import torch

from mixq_compile.benchmarking.device_figures import figures_of
from mixq_compile.errors import OptionError
from mixq_compile.inspection.cost import H200

CPU = torch.device("cpu")


def test_figures_are_given_in_tera_operations_and_gigabytes_a_second() -> None:
    figures = figures_of("float=990,int8=1979,bandwidth=3350", CPU)
    assert (figures.float_rate, figures.integer_rate, figures.bandwidth) == (990e12, 1979e12, 3350e9)


def test_auto_is_the_h200_for_a_gpu() -> None:
    assert figures_of("auto", torch.device("cuda")) is H200


def test_this_machine_is_measured_in_a_plausible_range() -> None:
    figures = figures_of("measure", CPU)
    assert 1e8 < figures.float_rate < 1e15
    assert 1e8 < figures.integer_rate < 1e15
    assert 1e8 < figures.bandwidth < 1e13


@pytest.mark.parametrize(
    "text",
    ["fast", "float=1", "float=1,int8=x,bandwidth=1", "float=1,int8=1,memory=1", ""],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="figures of a device are"):
        figures_of(text, CPU)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="above 0"):
        figures_of("float=0,int8=1,bandwidth=1", CPU)
