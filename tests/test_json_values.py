"""What JSON lacks is a text, in everything that is written as JSON."""

from __future__ import annotations

import json
import math

import pytest

from mixq_compile.cli.output import print_json
from mixq_compile.json_values import finite
from mixq_compile.scheme import OutlierPolicy


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_written_reads_back(value: float) -> None:
    text = json.dumps(finite({"figures": (value, 1.5), 3: None}), allow_nan=False)
    (written, other) = json.loads(text)["figures"]
    assert other == 1.5
    assert float(written) == value or (math.isnan(value) and math.isnan(float(written)))


def test_the_command_line_and_a_policy_write_it_alike(capsys: pytest.CaptureFixture[str]) -> None:
    policy = OutlierPolicy(threshold=math.inf)
    print_json({"threshold": policy.threshold})
    printed = json.loads(capsys.readouterr().out)["threshold"]
    assert printed == policy.to_json()["threshold"] == "inf"
    assert OutlierPolicy.from_json(policy.to_json()) == policy
