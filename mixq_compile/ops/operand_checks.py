"""What each operator's tensors must be: dtypes, one device, and shapes that fit each other.

Kernels read memory by these sizes, so that an operand of another shape or dtype would give garbage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixq_compile.errors import OperandError
from mixq_compile.formats import TensorFormat
from mixq_compile.ops.weight_codes import weight_bits
from mixq_compile.scheme import WeightRecipe
from mixq_compile.weights.recipe import parts

KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "float": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "fp32": (torch.float32,),
    "int32": (torch.int32,),
    "int8": (torch.int8,),
    "bool": (torch.bool,),
    "codes": (torch.int8, torch.uint8),
    "bytes": (torch.int8, torch.uint8),
    "any": (),
}
REMEMBERED = 1024
"""Combinations that an operator remembers to fit; each number of rows is one."""


@dataclass(frozen=True)
class _Operand:
    """One operand as `"kind sizes"` describes it, see `Operands`."""

    name: str
    kind: str
    leading: bool
    """Whether any number of leading dimensions, those of the rows, come first."""
    sizes: tuple[str, ...]
    may_be_empty: bool

    @classmethod
    def parse(cls, name: str, text: str) -> _Operand:
        kind, *sizes = text.removesuffix(" | empty").split()
        leading = sizes[:1] == ["*"]
        return cls(name, kind, leading, tuple(sizes[leading:]), text.endswith("| empty"))

    @property
    def halved(self) -> bool:
        """Whether the number of bytes only bounds K: two 4-bit codes share one."""
        return self.kind == "codes"


class Operands:
    """The operands of one operator, checked against each other in each call.

    An operand is written as its kind of dtype (`KINDS`) and its sizes: `*` stands for the leading
    dimensions, `_` for any size, `1+` for one or more, a number for itself, and a letter for a size that
    all operands share. Columns of `codes` are K, or ceil(K / 2) bytes for two 4-bit codes each.
    `| empty` allows a tensor without elements, and None is an operand that is left out.
    """

    def __init__(self, operator: str, **operands: str) -> None:
        self._operator = operator
        self._operands = [_Operand.parse(name, text) for name, text in operands.items()]
        # What lies in the module before what it is given: so an error blames the input.
        self._order = sorted(
            range(len(operands)), key=lambda at: (self._operands[at].leading, self._operands[at].halved)
        )
        self._fitting: set[tuple[object, ...]] = set()

    def select(self, given: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        """The operands in their order, of what is given by name."""
        return [given.get(operand.name) for operand in self._operands]

    def check(self, *tensors: Tensor | None) -> None:
        """Raises OperandError where these operands, in their order, do not fit. For real tensors."""
        key = tuple([None if item is None else (item.shape, item.dtype, item.device) for item in tensors])
        if key not in self._fitting:
            self.examine(*tensors)
            if len(self._fitting) >= REMEMBERED:
                self._fitting.clear()
            self._fitting.add(key)

    def examine_named(self, given: Mapping[str, Tensor | None]) -> None:
        """`examine` for operands by name."""
        self.examine(*self.select(given))

    def examine(self, *tensors: Tensor | None) -> None:
        """As `check`, without remembering; symbolic sizes fit everything, so that none gets a guard."""
        known: dict[str, tuple[int, str]] = {}
        leading: tuple[Sequence[int], str] | None = None
        halved: list[tuple[_Operand, Tensor]] = []
        present: Tensor | None = None
        double = ""
        for at in self._order:
            operand, tensor = self._operands[at], tensors[at]
            if tensor is None or (operand.may_be_empty and _is(tensor.numel(), 0)):
                continue
            self._examine_kind(operand, tensor)
            if operand.kind == "float":
                if tensor.dtype == torch.float64 and not operand.leading:
                    double = operand.name
                elif tensor.dtype != torch.float64 and operand.leading and double:
                    raise self._error(
                        operand, f"has the dtype {_name(tensor.dtype)}, and {double} float64",
                        "cast either to the other's dtype",
                    )  # fmt: skip
            if present is not None and tensor.device != present.device:
                raise self._error(
                    operand, f"is on {tensor.device}, and others are on {present.device}",
                    "move the module and its input to one device",
                )  # fmt: skip
            present = tensor
            self._examine_rank(operand, tensor)
            if operand.leading:
                found = tuple(tensor.shape[: tensor.dim() - len(operand.sizes)])
                if leading is None:
                    leading = found, operand.name
                elif len(found) != len(leading[0]) or any(map(_differ, found, leading[0])):
                    raise self._error(
                        operand, f"has the leading dimensions {_text(found)}",
                        f"{leading[1]} has {_text(leading[0])}, and both must be alike",
                    )  # fmt: skip
            if operand.halved and weight_bits(tensor) == 4:
                halved.append((operand, tensor))
            self._examine_sizes(operand, tensor, known)
        for operand, tensor in halved:
            columns, source = known.get(operand.sizes[1], (None, ""))
            if columns is not None and _differ(tensor.shape[1], (columns + 1) // 2):
                raise self._error(
                    operand, f"has {tensor.shape[1]} bytes a row, which hold two 4-bit codes each",
                    f"{columns} columns, as {source} has, take {(columns + 1) // 2}",
                )  # fmt: skip

    def _examine_kind(self, operand: _Operand, tensor: Tensor) -> None:
        allowed = KINDS[operand.kind]
        if allowed and tensor.dtype not in allowed:
            names = " or ".join(map(_name, allowed))
            raise self._error(operand, f"has the dtype {_name(tensor.dtype)}", f"it must be {names}")

    def _examine_rank(self, operand: _Operand, tensor: Tensor) -> None:
        rank = len(operand.sizes)
        if tensor.dim() < rank or (tensor.dim() > rank and not operand.leading):
            least = "at least " if operand.leading else ""
            raise self._error(
                operand, f"has {tensor.dim()} dimensions {_text(tensor.shape)}", f"it must have {least}{rank}"
            )

    def _examine_sizes(self, operand: _Operand, tensor: Tensor, known: dict[str, tuple[int, str]]) -> None:
        found = tensor.shape[tensor.dim() - len(operand.sizes) :]
        for place, (letter, size) in enumerate(zip(operand.sizes, found, strict=True)):
            if letter == "_" or (operand.halved and place == 1 and weight_bits(tensor) == 4):
                continue
            if letter == "1+":
                if _is(size, 0):
                    raise self._error(operand, "is empty", "it must have an element")
                continue
            wanted, source = (int(letter), "") if letter.isdigit() else known.get(letter, (None, ""))
            if wanted is None:
                if isinstance(size, int):
                    known[letter] = size, operand.name
            elif _differ(size, wanted):
                expected = [*found]
                expected[place] = wanted
                shape = _text(expected, "..., " if operand.leading else "")
                reason = f", because {source} has {letter} = {wanted}" if source else ""
                raise self._error(
                    operand, f"has the shape {_text(tensor.shape)}", f"it must be {shape}{reason}"
                )

    def _error(self, operand: _Operand, found: str, wanted: str) -> OperandError:
        return OperandError(f"mixq::{self._operator}: {operand.name} {found}: {wanted}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is(size: int, value: int) -> bool:
    """Whether a size is known to be this number; False for a symbolic one, on which it sets no guard."""
    return isinstance(size, int) and size == value


def _differ(left: int, right: int) -> bool:
    return isinstance(left, int) and isinstance(right, int) and left != right


def _text(sizes: Sequence[int], before: str = "") -> str:
    return f"[{before}{', '.join(str(size) for size in sizes)}]"


def examine_weight(
    operator: str,
    fmt: TensorFormat,
    codes: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
) -> None:
    """Raises OperandError where a weight's tensors are not those of its format, for codes `[..., K]`."""
    found = {"weight_codes": weight_codes, "weight_scale": weight_scale, "weight_zero": weight_zero}
    sizes = weight_codes.shape[0], codes.shape[-1]
    are_known = all(isinstance(size, int) for size in sizes)
    # Symbolic sizes fit everything: to compute with them would set guards.
    wanted = parts(WeightRecipe(fmt), *(sizes if are_known else (1, 1)), torch.float32)
    for name, tensor in found.items():
        prefix = f"mixq::{operator}: {name} "
        if tensor is None:
            if name in wanted:
                raise OperandError(f"{prefix}is missing: a weight in {fmt} has zero points.")
            continue
        if name not in wanted:
            raise OperandError(f"{prefix}was given: a weight in {fmt} has no zero points.")
        shape, dtype = wanted[name]
        if tensor.dtype != dtype:
            raise OperandError(
                f"{prefix}has the dtype {_name(tensor.dtype)}: in {fmt} it must be {_name(dtype)}."
            )
        if tensor.device != codes.device:
            raise OperandError(
                f"{prefix}is on {tensor.device}, and codes on {codes.device}: move the module and its input "
                "to one device."
            )
        if are_known and (len(tensor.shape) != len(shape) or any(map(_differ, tensor.shape, shape))):
            raise OperandError(
                f"{prefix}has the shape {_text(tensor.shape)}: it must be {_text(shape)}, because codes has "
                f"K = {sizes[1]} and the weight is in {fmt}."
            )


STATE = {
    "index": "int32 C",
    "column_slot": "int32 K",
    "column_max": "fp32 C",
    "counters": "int32 4",
    "effective_threshold": "fp32 1",
}
PRODUCT = {
    "codes": "int8 * K",
    "scale": "fp32 *",
    "outliers": "float * C",
    "count": "int32 1+",
    "weight_codes": "codes N K",
    "weight_scale": "fp32 N",
    "outlier_weight": "float N C",
    "bias": "float N",
}

QUANTIZE = Operands("quantize", x="float * K", index="int32 C", column_slot="int32 K", count="int32 1+")
QUANTIZE_ONLINE = Operands("quantize_online", x="float * K", **STATE, row_mask="bool *")
QUANTIZE_AFFINE = Operands(
    "quantize_affine", x="float * K", index="int32 C", column_slot="int32 K", count="int32 1+"
)
MIXED_GEMM = Operands("mixed_gemm", **{k: v for k, v in PRODUCT.items() if "scale" not in k and k != "bias"})
DEQUANTIZE = Operands(
    "dequantize", x="float * _", accumulator="int32 * N", outlier_product="fp32 * N", scale="fp32 *",
    weight_scale="fp32 N", bias="float N", addend="float * N",
)  # fmt: skip
MIXED_LINEAR = Operands("mixed_linear", x="float * _", **PRODUCT, addend="float * N")
READ_LINEAR = Operands("mixed_linear", x="float * K", **PRODUCT, addend="float * N")
"""Where few rows take the weight-only path, which reads x."""
GROUPED_LINEAR = Operands(
    "grouped_linear", codes="int8 * K", scale="fp32 *", outliers="float * C", count="int32 1+",
    weight_codes="any N _", outlier_weight="float N C", bias="float N", addend="float * N",
)  # fmt: skip
"""But for the tensors whose shape the format of the weight says: see `examine_weight`."""
WEIGHT_ONLY = Operands(
    "weight_only_linear", x="float * K", weight_codes="codes N K", weight_scale="fp32 N", bias="float N",
    addend="float * N",
)  # fmt: skip
FORMATTED_WEIGHT_ONLY = Operands(
    "weight_only_linear", x="float * K", weight_codes="bytes N _", bias="float N", addend="float * N"
)
"""Where a format says how codes, scales and zero points lie: see `examine_weight`."""
REFRESH = Operands(
    "refresh_outlier_weights", codes="any * K", index="int32 C", count="int32 1+", cached_index="int32 C",
    outlier_weight="float N C", weight_codes="codes N K", weight_scale="fp32 N",
    original="float N K | empty",
)  # fmt: skip
"""Of one of the linears that read a quantization point."""
QUANTIZED_LINEAR = Operands(
    "quantized_linear", codes="int8 * K", index="int32 S", column_slot="int32 N", column_max="fp32 S",
    counters="int32 4", effective_threshold="fp32 1", **{k: v for k, v in PRODUCT.items() if k != "codes"},
)  # fmt: skip
LINEAR = Operands(
    "linear", x="float * K", weight_codes="codes N K", weight_scale="fp32 N", bias="float N", **STATE,
    cached_index="int32 C", outlier_weight="float N C", original="float N K | empty", row_mask="bool *",
)  # fmt: skip
FORMATTED_LINEAR = Operands(
    "linear", x="float * K", weight_codes="any N _", bias="float N", **STATE, cached_index="int32 C",
    outlier_weight="float N C", original="float N K | empty", row_mask="bool *", left="float K R",
    right="float R N",
)  # fmt: skip
"""Where a format says how codes, scales and zero points lie: see `examine_weight`."""
