"""The shapes that benchmarks run: linears of known models, and the models by configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mixq_compile.errors import MixqError, OptionError, unknown_name

Family = Literal["llama", "qwen2"]


@dataclass(frozen=True)
class LinearShape:
    """One linear: `[M, K] -> [M, N]`, N = out_features and K = in_features."""

    out_features: int
    in_features: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.out_features}×{self.in_features}"


@dataclass(frozen=True)
class ModelShape:
    """A decoder by its configuration; its weights are random."""

    name: str
    family: Family
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.heads

    def projections(self) -> tuple[LinearShape, ...]:
        """The seven linears of one layer, in the order in which they run."""
        hidden, inner = self.hidden_size, self.intermediate_size
        narrow = self.key_value_heads * self.head_size
        return (
            LinearShape(hidden, hidden, "q_proj"),
            LinearShape(narrow, hidden, "k_proj"),
            LinearShape(narrow, hidden, "v_proj"),
            LinearShape(hidden, hidden, "o_proj"),
            LinearShape(inner, hidden, "gate_proj"),
            LinearShape(inner, hidden, "up_proj"),
            LinearShape(hidden, inner, "down_proj"),
        )

    def config(self, layers: int, positions: int) -> Any:
        """A transformers configuration of this shape with so many layers and positions.

        Raises MixqError where transformers is not installed.
        """
        try:
            from transformers import LlamaConfig, Qwen2Config
        except ImportError as error:
            raise MixqError(
                "this benchmark builds models with transformers, which is not installed: "
                "pip install 'mixq-compile[bench]'"
            ) from error
        kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.family]
        return kind(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=positions,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        )


TOY = "toy"
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 32000),
        ModelShape("llama-2-13b", "llama", 5120, 13824, 40, 40, 40, 32000),
        ModelShape("llama-2-70b", "llama", 8192, 28672, 80, 64, 8, 32000),
        ModelShape("llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128256),
        ModelShape("qwen2-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064),
        # For trying a command, and for tests: it shows nothing about speed.
        ModelShape(TOY, "llama", 64, 128, 2, 4, 2, 96),
    )
}
"""Models by name."""

KERNEL_SHAPES = (
    LinearShape(11008, 4096, "7B up"),
    LinearShape(4096, 11008, "7B down"),
    LinearShape(28672, 8192, "70B up"),
    LinearShape(8192, 28672, "70B down"),
    LinearShape(12288, 4096, "7B q/k/v"),
    LinearShape(10240, 8192, "70B q/k/v"),
    LinearShape(4096, 4096, "7B o"),
    LinearShape(8192, 8192, "70B o"),
)
"""Linears of Llama-2-7B and 70B, q/k/v merged."""
LAYOUT_SHAPES = KERNEL_SHAPES[:3]
"""Those that the structural comparisons run."""
LAYER_ROWS = (1, 16, 256, 1024, 4096)
LAYOUT_ROWS = (256, 1024, 4096)
KERNEL_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def find_model(name: str) -> ModelShape:
    """The model of this name. Raises OptionError that lists the valid names."""
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    return MODELS[name]


def parse_shape(text: str) -> LinearShape:
    """The linear that `N,K` or `NxK` means. Raises OptionError for anything else."""
    parts = text.replace("x", ",").replace("×", ",").split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"a shape is N,K (out_features,in_features), for example 11008,4096, not {text!r}.")
    out_features, in_features = int(parts[0]), int(parts[1])
    known = (shape for shape in KERNEL_SHAPES if (shape.out_features, shape.in_features) == (
        out_features, in_features))  # fmt: skip
    return next(known, LinearShape(out_features, in_features))
