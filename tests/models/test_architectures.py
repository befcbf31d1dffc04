"""Every architecture through every route: enough signal, the same by all three, and a reason for the rest."""

import pytest
import torch

from mixq_compile import quantize, report
from tests.models.architectures import ARCHITECTURES, ROUTES, outcome_of

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
    assert set(outcome.sqnr) | set(outcome.without) == set(ROUTES), str(outcome)


def test_the_experts_of_a_mixture_are_named_as_left_alone():
    mixtral = next(entry for entry in ARCHITECTURES if entry.name == "Mixtral")
    outcome = outcome_of(mixtral)
    assert any("grouped" in reason for reason in outcome.skipped), str(outcome)
    assert any("router" in reason for reason in outcome.skipped), str(outcome)


READERS = {
    "nn.TransformerEncoder": "MultiheadAttention.forward",
    "DeBERTa": "DisentangledSelfAttention.forward",
    "WavLM": "WavLMAttention.torch_multi_head_self_attention",
    "Mamba": "MambaMixer",
    "FalconMamba": "FalconMambaMixer",
    "Jamba": "JambaMambaMixer",
    "DETR": "DetrMHAttentionMap.forward",
}
"""Architectures of which some module reads a linear's weight, and that module."""


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda entry: entry.name)
def test_the_swap_leaves_alone_just_the_linears_whose_weight_is_read(architecture):
    reasons = {linear.fqn: linear.skip for linear in report(quantize(architecture.build())).skipped}
    readers = {reason.partition("is read by ")[2] for reason in reasons.values() if "is read by" in reason}
    expected = READERS.get(architecture.name)
    assert len(readers) == (expected is not None), reasons
    assert all(reader.startswith(expected) for reader in readers), reasons
    others = [reason for reason in reasons.values() if "is read by" not in reason]
    known = ("ignored", "too small", "unsupported: grouped", "the output head", "it makes the output")
    assert all(reason.startswith(known) for reason in others), reasons
