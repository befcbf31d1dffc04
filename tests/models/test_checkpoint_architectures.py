"""Every architecture gives the same quantized model by module, by file, and saved again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.checkpoint_architectures import SETTINGS, outcome_of

QUICK = {"Llama, tied head", "Falcon (40B style)", "ChatGLM (GLM)", "Gemma 3", "Mixtral", "GPT-2", "BLOOM"}
LEAST_SQNR_DB = 28.0


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SETTINGS],
)
def test_both_routes_agree_in_every_bit(architecture: str, tmp_path: Path) -> None:
    outcome = outcome_of(architecture, tmp_path)
    assert outcome.differs == ""
    assert outcome.by_file >= 4
    assert outcome.sqnr > LEAST_SQNR_DB
    assert outcome.generated == 5
