"""Evaluation: how far a quantized model is from the original one."""

from mixq_compile.evaluation.divergence import Divergence, WindowScore, divergence, scores
from mixq_compile.evaluation.fidelity import mean_cosine, relative_error, sqnr
from mixq_compile.evaluation.generation import GenerationComparison, compare_generation, generate_text
from mixq_compile.evaluation.perplexity import PerplexityResult, perplexity, perplexity_windows
from mixq_compile.evaluation.protocols import PROTOCOLS

__all__ = [
    "PROTOCOLS",
    "Divergence",
    "GenerationComparison",
    "PerplexityResult",
    "WindowScore",
    "compare_generation",
    "divergence",
    "generate_text",
    "mean_cosine",
    "perplexity",
    "perplexity_windows",
    "relative_error",
    "scores",
    "sqnr",
]
