"""One linear at several numbers of rows: times of its parts beside its peers', speed-ups, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from mixq_compile.benchmarking import baselines
from mixq_compile.benchmarking.choices import (
    DEFAULT_PEERS,
    ERRORS,
    GEMM,
    PARTS,
    PRODUCT_PEERS,
    QUANTIZE,
    WHOLE,
    WHOLE_PEERS,
    check_replays,
)
from mixq_compile.benchmarking.packed_linear import PackedLinear, default_capacity
from mixq_compile.benchmarking.planted import planted_activation, planted_columns, random_weight
from mixq_compile.benchmarking.shapes import KERNEL_ROWS, KERNEL_SHAPES, LinearShape
from mixq_compile.benchmarking.timing import Call, Floor, Timings, measure
from mixq_compile.errors import OptionError
from mixq_compile.evaluation import relative_error

MIXQ_GEMM, MIXQ_WHOLE = "mixq gemm", "mixq whole"
STATIC, ONLINE, CHECKED = "quantize, static", "quantize, online", "quantize, online and refresh"
ERROR_ROWS = 256
"""Errors are taken over at most so many rows: they do not depend on how many there are."""


@dataclass(frozen=True)
class KernelOptions:
    """What `mixq bench kernels` measures, and how."""

    shapes: tuple[LinearShape, ...] = KERNEL_SHAPES
    rows: tuple[int, ...] = KERNEL_ROWS
    bits: int = 8
    """Bits of a weight code."""
    parts: tuple[str, ...] = PARTS
    peers: tuple[str, ...] = DEFAULT_PEERS
    outliers: int | None = None
    """Planted outlier columns where times are taken; None: all slots, 128 from K = 4096 up."""
    error_outliers: int = 32
    """Planted outlier columns where errors are taken; at most half the slots."""
    outlier_size: float = 20.0
    """How many times as large as the others outlier columns are."""
    replays: int = 21
    kernel: str = "auto"
    """Kernel provider of every operator."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise OptionError(f"weight codes have 4 or 8 bits, not {self.bits}.")
        check_replays(self.replays)
        for shape in self.shapes:
            slots = default_capacity(shape.in_features)
            if self.outliers is not None and not 0 < self.outliers <= slots:
                raise OptionError(
                    f"{self.outliers} outlier columns do not fit the {slots} slots that a linear with "
                    f"{shape.in_features} input channels has."
                )


@dataclass(frozen=True)
class QuantizationCost:
    """What quantizing an activation moves, and how near to a copy's speed."""

    bytes_moved: int
    """Activation read once; codes, scales and outlier columns written once."""
    static_share: float
    """Of the copy bandwidth, with fixed columns."""
    online_share: float
    """Of the copy bandwidth, with the check for new columns."""
    check_us: float
    """Online quantization and refresh without a new column, less static quantization."""


@dataclass(frozen=True)
class KernelCase:
    """One linear at one number of rows."""

    name: str
    out_features: int
    in_features: int
    rows: int
    path: str
    """`mixed`, or `weight-only` where so few rows take that path."""
    outlier_columns: int
    timings: Timings
    missing: dict[str, str]
    gemm_tflops: dict[str, float] = field(default_factory=dict)
    gemm_speedup: dict[str, float] = field(default_factory=dict)
    """Time of a peer over that of the product alone."""
    whole_speedup: dict[str, float] = field(default_factory=dict)
    """Time of a peer over that of the whole linear."""
    quantization: QuantizationCost | None = None
    errors: dict[str, float] = field(default_factory=dict)
    """Relative errors against float64; those named `scheme` are of the float64 simulation."""

    def speedups(self, part: str) -> dict[str, float]:
        """Speed-ups of the part `gemm` or `whole` over each peer."""
        return self.gemm_speedup if part == GEMM else self.whole_speedup


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype of activations: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class LinearBench:
    """One linear, packed once for all numbers of rows."""

    shape: LinearShape
    options: KernelOptions
    device: torch.device
    weight: Tensor
    linear: PackedLinear
    """Its state knows the planted columns."""
    columns: tuple[int, ...]

    @classmethod
    def build(cls, shape: LinearShape, options: KernelOptions, device: torch.device) -> LinearBench:
        """A random weight, packed."""
        capacity = default_capacity(shape.in_features)
        weight = random_weight(shape.out_features, shape.in_features, default_dtype(device), device)
        columns = planted_columns(shape.in_features, min(options.outliers or capacity, shape.in_features))
        return cls(
            shape=shape,
            options=options,
            device=device,
            weight=weight,
            linear=PackedLinear.pack(weight, options.bits, capacity, options.kernel),
            columns=columns,
        )

    def case(self, rows: int, floor: Floor) -> KernelCase:
        """Times and errors at this number of rows."""
        options, shape = self.options, self.shape
        x = self._activation(rows, self.columns)
        self.linear.know(self.columns)
        wanted = self._peers_of_parts()
        peers, missing = baselines.build_peers(wanted, self.weight, x)
        calls = {**self._own_calls(x), **baselines.peer_calls(peers, x)}
        timings, failed = measure(calls, self.device, options.replays)
        missing |= failed
        weight_only = rows <= self.linear.small_m
        made = KernelCase(
            name=shape.name,
            out_features=shape.out_features,
            in_features=shape.in_features,
            rows=rows,
            path="weight-only" if weight_only else "mixed",
            outlier_columns=0 if weight_only else len(self.columns),
            timings=timings,
            missing=missing,
        )
        usable = {name: peer for name, peer in peers.items() if name not in failed}
        return dataclasses.replace(
            made,
            gemm_tflops=self._tflops(timings, rows),
            gemm_speedup=self._speedups(timings, PRODUCT_PEERS, MIXQ_GEMM),
            whole_speedup=self._speedups(timings, WHOLE_PEERS, MIXQ_WHOLE),
            quantization=self._quantization(timings, rows, floor),
            errors=self._errors(rows, usable) if ERRORS in options.parts else {},
        )

    def _activation(self, rows: int, columns: tuple[int, ...]) -> Tensor:
        return planted_activation(
            rows, self.shape.in_features, columns, self.options.outlier_size,
            default_dtype(self.device), self.device, seed=rows,
        )  # fmt: skip

    def _peers_of_parts(self) -> list[str]:
        parts = self.options.parts
        return [
            name
            for name in self.options.peers
            if (GEMM in parts and name in PRODUCT_PEERS) or (WHOLE in parts and name in WHOLE_PEERS)
        ]

    def _own_calls(self, x: Tensor) -> dict[str, Call]:
        linear, parts = self.linear, self.options.parts
        calls = {}
        if GEMM in parts or WHOLE in parts:
            name = baselines.float_name(x.dtype)
            calls[name] = Call(lambda: functional.linear(x, self.weight))
        if GEMM in parts:
            quantized = linear.quantize_static(x)
            calls[MIXQ_GEMM] = Call(lambda: linear.multiply(x, quantized))
        if WHOLE in parts:
            calls[MIXQ_WHOLE] = Call(lambda: linear.whole(x))
        if QUANTIZE in parts and x.shape[0] > linear.small_m:
            calls[STATIC] = Call(lambda: linear.quantize_static(x))
            calls[ONLINE] = Call(lambda: linear.quantize_online(x))
            calls[CHECKED] = Call(lambda: linear.refresh(linear.quantize_online(x)))
        return calls

    def _tflops(self, timings: Timings, rows: int) -> dict[str, float]:
        operations = 2 * rows * self.shape.out_features * self.shape.in_features
        products = (baselines.float_name(self.weight.dtype), *PRODUCT_PEERS, MIXQ_GEMM)
        return {
            name: operations / timings[name].median_us * 1e-6
            for name in products
            if MIXQ_GEMM in timings and name in timings
        }

    def _speedups(self, timings: Timings, peers: Sequence[str], own: str) -> dict[str, float]:
        """Times of 16 bit and of the peers over our own."""
        names = (baselines.float_name(self.weight.dtype), *peers)
        return {
            name: timings[name].median_us / timings[own].median_us
            for name in names
            if own in timings and name in timings
        }

    def _quantization(self, timings: Timings, rows: int, floor: Floor) -> QuantizationCost | None:
        if STATIC not in timings:
            return None
        element = self.weight.element_size()
        slots = self.linear.state.capacity
        moved = rows * (self.shape.in_features * (element + 1) + 4 + slots * element)
        copied = floor.copy_bytes_per_second * 1e-6
        return QuantizationCost(
            bytes_moved=moved,
            static_share=moved / timings[STATIC].median_us / copied,
            online_share=moved / timings[ONLINE].median_us / copied,
            check_us=timings[CHECKED].median_us - timings[STATIC].median_us,
        )

    def _errors(self, rows: int, peers: dict[str, Callable[[Tensor], object]]) -> dict[str, float]:
        """Relative errors of everything that computes the linear, over the first rows."""
        slots = self.linear.state.capacity
        columns = planted_columns(
            self.shape.in_features, min(self.options.error_outliers, slots // 2), seed=1
        )
        x = self._activation(rows, columns)
        few = x[:ERROR_ROWS]
        reference = few.double() @ self.weight.double().T
        found = {
            baselines.float_name(x.dtype): relative_error(reference, functional.linear(few, self.weight))
        }
        for source, originals in (("codes", False), ("originals", True)):
            self.linear.forget()
            output = self.linear.whole(x, originals=originals)[:ERROR_ROWS]
            known = self.linear.state.columns()
            found[f"mixq, {source}"] = relative_error(reference, output)
            simulated = self.linear.simulated(few, known, rows, originals)
            found[f"scheme, {source}"] = relative_error(reference, simulated)
        for name, peer in peers.items():
            if name in WHOLE_PEERS:
                found[name] = _peer_error(reference, peer, x)
        return found


def _peer_error(reference: Tensor, peer: Callable[[Tensor], object], x: Tensor) -> float:
    output = peer(x)
    assert isinstance(output, Tensor)
    return relative_error(reference, output[:ERROR_ROWS])
