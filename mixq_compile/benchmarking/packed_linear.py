"""One quantized linear in parts: what its operators do one by one, and all together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mixq_compile.formats import INT8, TensorFormat
from mixq_compile.ops import composition
from mixq_compile.ops.outlier_state import STATE_FIELDS, OutlierState
from mixq_compile.ops.providers import KernelQuery, small_batch_limit
from mixq_compile.ops.weight_codes import EPSILON, dequantize_weight, quantize_weight
from mixq_compile.scheme import OutlierPolicy, WeightRecipe
from mixq_compile.thresholds import PAPER_THRESHOLD

ACTIVATION = INT8


class Quantized(NamedTuple):
    """Quantized rows."""

    codes: Tensor
    """[M, K]"""
    scale: Tensor
    """[M]"""
    outliers: Tensor
    """[M, C]"""
    used: Tensor
    """How many of the C slots hold one; operators call it `count`, which a tuple has already."""

    @property
    def operands(self) -> dict[str, Tensor]:
        """By the names of operands."""
        return {"codes": self.codes, "scale": self.scale, "outliers": self.outliers, "count": self.used}


@dataclass(frozen=True)
class PackedLinear:
    """A packed weight with its outlier state. N = out_features, K = in_features, C slots."""

    weight: Tensor
    """[N, K] in 16 or 32 bit."""
    codes: Tensor
    scale: Tensor
    state: OutlierState
    cached_index: Tensor
    outlier_weight: Tensor
    bits: int
    small_m: int
    """Most rows that the weight-only path takes."""
    kernel: str

    @classmethod
    def pack(cls, weight: Tensor, bits: int, capacity: int, kernel: str) -> PackedLinear:
        """Quantizes a weight; its state knows no columns yet."""
        out_features, in_features = weight.shape
        codes, scale = quantize_weight(weight, WeightRecipe(TensorFormat(bits)))
        query = KernelQuery(
            "mixed_linear", weight.device, weight.dtype, TensorFormat(bits), INT8, in_features, out_features
        )
        return cls(
            weight=weight,
            codes=codes,
            scale=scale,
            state=OutlierState.create(in_features, capacity, PAPER_THRESHOLD, weight.device),
            cached_index=torch.full((capacity,), -1, dtype=torch.int32, device=weight.device),
            outlier_weight=torch.zeros(out_features, capacity, dtype=weight.dtype, device=weight.device),
            bits=bits,
            small_m=small_batch_limit(query, kernel),
            kernel=kernel,
        )

    def with_own_state(self) -> PackedLinear:
        """A copy that shares the weight, and learns on its own."""
        buffers = {name: getattr(self.state, name).clone() for name in STATE_FIELDS}
        return dataclasses.replace(
            self,
            state=OutlierState(**buffers, threshold=self.state.threshold),
            cached_index=self.cached_index.clone(),
            outlier_weight=self.outlier_weight.clone(),
        )

    def always_mixed(self) -> PackedLinear:
        """The same without the weight-only path, at any number of rows."""
        return dataclasses.replace(self, small_m=0)

    def know(self, columns: Sequence[int]) -> None:
        """Sets the state to these outlier columns, with their weights from the original."""
        self.forget()
        self.state.preload(columns)
        used = len(columns)
        self.cached_index[:used] = self.state.index[:used]
        self.outlier_weight[:, :used] = self.weight[:, list(columns)]

    def forget(self) -> None:
        """Back to a state without outlier columns."""
        self.state.preload(())
        self.cached_index.fill_(-1)
        self.outlier_weight.zero_()

    def changing(self) -> tuple[Tensor, ...]:
        """The buffers that a call may change."""
        return (*self.state.buffers(), self.cached_index, self.outlier_weight)

    def _given(self, x: Tensor, miss: str, source: Tensor | None = None) -> composition.Given:
        """What `ops.composition` takes; `source` is the weight that columns are fetched from."""
        return {
            **self.state.named_buffers(),
            "x": x,
            "weight_codes": self.codes,
            "weight_scale": self.scale,
            "bias": None,
            "cached_index": self.cached_index,
            "outlier_weight": self.outlier_weight,
            "original": source,
            "format": str(ACTIVATION),
            "miss": miss,
            "small_m": self.small_m,
            "kernel": self.kernel,
        }

    def quantize_static(self, x: Tensor) -> Quantized:
        """Quantizes with the columns known, without looking for others."""
        return self.quantize_online(x, composition.STATIC)

    def quantize_online(self, x: Tensor, miss: str = "exact") -> Quantized:
        """Quantizes and checks for columns that are not known."""
        given = composition.quantized(self._given(x, miss))
        return Quantized(given["codes"], given["scale"], given["outliers"], given["count"])

    def refresh(self, quantized: Quantized, originals: bool = False) -> None:
        """Fetches the weights of new columns, from the codes or from the originals."""
        source = self.weight if originals else self.weight.new_empty(0)
        given = self._given(quantized.codes, composition.STATIC, source)
        composition.refreshed({**given, **quantized.operands})

    def multiply(self, x: Tensor, quantized: Quantized) -> Tensor:
        """The product and its dequantization in one kernel; `[M, N]`."""
        given = {**self._given(x, composition.STATIC), **quantized.operands}
        return composition.multiplied(given)  # type: ignore[no-any-return]

    def whole(self, x: Tensor, miss: str = "exact", originals: bool = False) -> Tensor:
        """The whole linear: quantization, check, outlier weights, product."""
        quantized = self.quantize_static(x) if miss == "static" else self.quantize_online(x, miss)
        self.refresh(quantized, originals)
        return self.multiply(x, quantized)

    def simulated(self, x: Tensor, columns: Sequence[int], rows: int, originals: bool) -> Tensor:
        """The scheme in float64: exact sums of what it rounds, rounded once at the end; `[M, N]` float64.

        `rows` is the M of the call that x `[M', K]` is a part of: it decides about the path.
        """
        weight = dequantize_weight(self.codes, self.scale, x.shape[1]).double()
        if rows <= self.small_m:
            return (x.double() @ weight.T).to(x.dtype).double()
        kept = list(columns)
        inner = x.double().index_fill(1, torch.tensor(kept, dtype=torch.int64, device=x.device), 0.0)
        largest_code = ACTIVATION.largest_code
        scale = inner.abs().amax(dim=1, keepdim=True).clamp_min(EPSILON) / largest_code
        result = (inner / scale).round() * scale @ weight.T
        outlier_weight = self.weight.double() if originals else weight.to(x.dtype).double()
        result += x[:, kept].double() @ outlier_weight[:, kept].T
        rounded: Tensor = result.to(x.dtype).double()
        return rounded


def default_capacity(in_features: int) -> int:
    """The outlier slots that the schemes give a linear of this many input channels."""
    return OutlierPolicy().capacity_for(in_features)
