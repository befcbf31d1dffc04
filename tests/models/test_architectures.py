"""Every architecture through every route: enough signal, the same by all three, and a reason for the rest."""

import pytest
import torch

from tests.models.architectures import ARCHITECTURES, outcome_of

LEAST_SQNR = 28.0
MOST_DIFFERENCE = 0.5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_all_routes(architecture):
    outcome = outcome_of(architecture)
    print(outcome)
    assert outcome.quantized > 0, str(outcome)
    assert min(outcome.sqnr.values()) >= LEAST_SQNR, str(outcome)
    assert max(outcome.sqnr.values()) - min(outcome.sqnr.values()) <= MOST_DIFFERENCE, str(outcome)


def test_the_experts_of_a_mixture_are_named_as_left_alone():
    mixtral = next(entry for entry in ARCHITECTURES if entry.name == "Mixtral")
    outcome = outcome_of(mixtral)
    assert any("grouped" in reason for reason in outcome.skipped), str(outcome)
    assert any("router" in reason for reason in outcome.skipped), str(outcome)
