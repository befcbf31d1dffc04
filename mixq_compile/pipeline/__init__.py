"""Passes, and the pipelines that run them: parse, check, run, record."""

from mixq_compile.pipeline.facts import Fact, fact
from mixq_compile.pipeline.failures import PassError, PassVerificationError
from mixq_compile.pipeline.history import History, PassRecord
from mixq_compile.pipeline.passes import Decision, Fuel, Pass, PassContext, WeightProvider
from mixq_compile.pipeline.pipeline import Pipeline
from mixq_compile.pipeline.registry import PassRegistry, get_pass, pass_names, pipeline_names

__all__ = [
    "Decision",
    "Fact",
    "Fuel",
    "History",
    "Pass",
    "PassContext",
    "PassError",
    "PassRecord",
    "PassRegistry",
    "PassVerificationError",
    "Pipeline",
    "WeightProvider",
    "fact",
    "get_pass",
    "pass_names",
    "pipeline_names",
]
