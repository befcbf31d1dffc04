"""What the store keeps of one parameter: its packed forms, caches of outlier columns, and outlier states."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.joint_rows import held_bytes
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.scheme import QuantScheme, WeightRecipe
from mixq_compile.thresholds import Threshold
from mixq_compile.weights import recipe as recipes
from mixq_compile.weights.quantized_weight import QuantizedWeight
from mixq_compile.weights.recipe import InputStatistics


@dataclass(frozen=True)
class WeightKey:
    """What a packed form of a parameter is known by, beside the parameter."""

    recipe: WeightRecipe
    transposed: bool
    """True where the parameter is [K, N], as GPT-2's Conv1D has it."""
    device: torch.device
    factors: torch.dtype | None
    """dtype of low-rank factors; None where there are none."""
    statistics: str | None
    """Which statistics it was made with; None where it needs none."""

    @classmethod
    def of(
        cls,
        weight: Tensor,
        scheme: QuantScheme,
        dtype: torch.dtype,
        transposed: bool,
        statistics: InputStatistics | None,
    ) -> WeightKey:
        """The key of a parameter's form under a scheme, for activations of this dtype."""
        recipe = scheme.recipe
        source = statistics.source if statistics is not None and recipes.needs(recipe) else None
        return cls(recipe, transposed, weight.device, dtype if recipe.low_rank else None, source)

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter as [N, K]."""
        return weight.detach().t() if self.transposed else weight.detach()


@dataclass(eq=False)
class StoredWeight:
    """One packed form of a parameter; its tensors are changed only in place."""

    key: WeightKey
    tensors: QuantizedWeight
    statistics: InputStatistics | None
    """What it is made with, where its recipe needs any."""
    packed_from: tuple[int, int]
    """`fingerprint` of the parameter when it was packed."""
    content: Tensor | None
    """`content_of` the parameter when it was packed; None where it has no data."""

    @staticmethod
    def solve(key: WeightKey, weight: Tensor, statistics: InputStatistics | None) -> QuantizedWeight:
        """The tensors of a parameter as it is now; without data where it has none."""
        matrix = key.matrix(weight)
        out_features, in_features = matrix.shape
        dtype = key.factors or torch.float32
        if not has_data(weight):
            shapes = recipes.parts(key.recipe, out_features, in_features, dtype)
            named = {name: weight.new_empty(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
            return QuantizedWeight.from_named(named)
        return recipes.make(key.recipe, matrix, dtype, statistics.tensors if statistics is not None else None)

    def replace(self, fresh: QuantizedWeight) -> None:
        """Writes other values into the tensors."""
        for name, tensor in self.named().items():
            tensor.copy_(fresh.named()[name])
        if self.tensors.kept is not None and fresh.kept is not None:
            self.tensors.kept.copy_(fresh.kept)

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names of operands."""
        return self.tensors.named()

    @property
    def weight_codes(self) -> Tensor:
        """The codes as `weights.recipe.parts` has them."""
        return self.tensors.codes

    @property
    def weight_scale(self) -> Tensor:
        """The scales."""
        return self.tensors.scale

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(held_bytes(tensor) for tensor in self.named().values())


@dataclass
class PackedWeight:
    """A packed form of a weight, and the cache of outlier columns of one capacity and dtype."""

    stored: StoredWeight
    outlier_weight: Tensor
    """[N, C] in the activation's dtype: the weight columns of the slots in `cached_index`."""
    cached_index: Tensor
    """[C] int32, -1 where a slot is empty."""

    def named(self) -> dict[str, Tensor]:
        """The tensors of the packed form by the names of operands."""
        return self.stored.named()

    @property
    def weight_codes(self) -> Tensor:
        """The codes' tensor."""
        return self.stored.weight_codes

    @property
    def weight_scale(self) -> Tensor:
        """The scales' tensor."""
        return self.stored.weight_scale

    def fetch(self, weight: Tensor, slots: Tensor) -> None:
        """Copies the columns that these slots of `cached_index` name from the parameter, or the codes."""
        columns = self.cached_index[slots].long()
        key = self.stored.key
        source = key.matrix(weight)
        if recipes.outliers_from_codes(key.recipe):
            given = self.stored.statistics.tensors if self.stored.statistics is not None else {}
            source = self.stored.tensors.outlier_columns(
                key.recipe.format, source.shape[1], given.get(recipes.KEPT)
            )
        self.outlier_weight[:, slots] = source[:, columns].to(self.outlier_weight.dtype)


@dataclass(frozen=True)
class StateKey:
    """What an outlier state is known by, beside a parameter."""

    threshold: Threshold
    capacity: int
    miss: str
    format: str | None
    device: torch.device
    columns: tuple[int, ...] | None
    readers: frozenset[int]
    """ids of all parameters that read the value."""


@dataclass
class Entry:
    """What is known of one parameter."""

    stored: dict[WeightKey, StoredWeight] = field(default_factory=dict)
    packed: dict[tuple[WeightKey, int, torch.dtype], PackedWeight] = field(default_factory=dict)
    states: dict[StateKey, OutlierState] = field(default_factory=dict)
    kept_because: str | None = None
    """Why `release_weights` left the parameter its memory."""
