import json

import pytest
import torch
from captures import TwoLayers, capture
from throwaway_passes import REGISTRY

from mixq_compile.errors import OptionError
from mixq_compile.pipeline import Fuel, History, PassContext, PassVerificationError, Pipeline


@pytest.fixture
def history() -> History:
    graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
    pipeline = Pipeline.parse("annotate-linears{ignore=second},negate-twice", REGISTRY)
    return pipeline.run(graph, PassContext(fuel=Fuel(2)))


def test_it_round_trips_through_json(history: History) -> None:
    read = History.from_json(json.loads(json.dumps(history.to_json(), allow_nan=False)))
    assert read == history
    assert read.final == history.final


def test_so_does_one_without_snapshots_and_one_with_findings() -> None:
    graph = capture(TwoLayers(), torch.randn(2, 8), route="export")
    with pytest.raises(PassVerificationError) as caught:
        Pipeline.parse("swap-operands", REGISTRY).run(graph, snapshots=False)
    history = caught.value.history
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


def test_another_schema_version_is_refused(history: History) -> None:
    with pytest.raises(OptionError, match="schema version 99; this release reads version 1"):
        History.from_json({**history.to_json(), "schema": 99})


def test_it_names_its_pipeline(history: History) -> None:
    assert history.pipeline == "annotate-linears{ignore=second},negate-twice"
