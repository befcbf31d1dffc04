"""What became of each linear of a graph, read from its history alone."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mixq_compile.ir.linears import features_of
from mixq_compile.ir.name_patterns import name_matches
from mixq_compile.ir.snapshot import NodeRow
from mixq_compile.ops.linear_recipe import LinearRecipe
from mixq_compile.ops.traits import traits_of
from mixq_compile.pipeline.history import History
from mixq_compile.scheme import QuantScheme, WeightRecipe
from mixq_compile.schemes.registry import get_scheme, scheme_names
from mixq_compile.weights.recipe import packed_bytes

LINEAR = "aten.linear.default"
SWAPPED = "mixq.linear.default"
"""What the module of a linear that was swapped before the capture calls."""
NEVER_REWRITTEN = "it has a scheme, but no pass rewrote it"
NOT_LOOKED_AT = "no pass looked at it"
_VALUE = re.compile(r"^(?P<dtype>[a-z]+?(?P<bits>\d+))\[(?P<sizes>[^\]]*)\]")


@dataclass(frozen=True)
class LayerSummary:
    """One linear: what it is, what became of it and why, what it holds and costs."""

    fqn: str
    role: str
    out_features: int
    """0 where the capture does not tell: a product whose weight is no parameter."""
    in_features: int
    dtype: str
    """Of the weight before quantization."""
    scheme: str | None
    """None where the linear stays as it was."""
    weight_bits: int
    activation_bits: int
    kernel: str | None
    skip: str | None
    """Why it stays as it was."""
    where: str
    """The line of the model's Python code."""
    bytes_before: int
    bytes_after: int
    """Bytes of codes, scales and outlier columns."""
    capacity: int = 0
    """Most outlier columns; 0 where the scheme has none."""
    calibrated_columns: int = 0
    """Outlier columns known from calibration."""
    found_columns: int | None = None
    """Outlier columns while running; None where nothing was run."""
    sqnr_db: float | None = None
    """Of the layer's own output, on inputs from the model in full precision; None where not measured."""
    weights_db: float | None = None
    """What the SQNR would be with only the weight rounded."""
    inputs_db: float | None = None
    """What it would be with only the input rounded."""
    left_out: int | None = None
    """Outlier columns beyond the slots."""
    costs: dict[str, Any] = field(default_factory=dict)
    """By number of rows: operations, bytes moved and expected time, before and after."""
    area: float | None = None
    """Circuit area in NAND2 equivalents; None where none was estimated."""
    recipe: str = ""
    """How its weight is packed, as text; empty where it stays as it was."""


def layers_of(history: History) -> tuple[LayerSummary, ...]:
    """Every linear that the passes of a history saw, in the order in which they run."""
    if history.initial is None:
        return ()
    values = {row.name: row.value for row in _all_rows(history)}
    final = history.final.rows
    products = _products(final)
    left = {row.fqn: row for row in final if _is_linear(row)}
    return tuple(
        _summary(row, values, products.get(fqn), left.get(fqn))
        for fqn, row in _linears(history).items()
        if fqn
    )


def schemes_of(history: History) -> dict[str, QuantScheme]:
    """The scheme of each linear that was rewritten, with the options for outliers applied."""
    if history.initial is None:
        return {}
    products = _products(history.final.rows)
    return {
        fqn: QuantScheme.from_json(row.annotations["parameters"])
        for fqn, row in _linears(history).items()
        if fqn in products and row.annotations.get("parameters")
    }


def calibrated_columns(history: History) -> dict[str, list[int]]:
    """The outlier columns that calibration chose, by layer."""
    if history.initial is None:
        return {}
    return {
        fqn: row.annotations["outlier_columns"]
        for fqn, row in _linears(history).items()
        if row.annotations.get("outlier_columns") is not None
    }


def matching(fqns: Iterable[str], pattern: str) -> tuple[str, ...]:
    """The names that a pattern means, as `ir.name_patterns` says."""
    return tuple(fqn for fqn in fqns if name_matches(fqn, pattern))


def lies_in(fqn: str, pattern: str) -> bool:
    """True where the pattern means the name, or a module that it is a part of."""
    return bool(matching(itertools.accumulate(fqn.split("."), "{}.{}".format), pattern))


def _all_rows(history: History) -> Iterator[NodeRow]:
    """Every row of every snapshot, later ones last, and one for each linear inside of a region."""
    assert history.initial is not None
    yield from history.initial.rows
    for record in history.records:
        if record.diff is not None:
            yield from record.diff.added
            for _, new in record.diff.changed:
                yield new
                yield from _held(new)


def _held(row: NodeRow) -> Iterator[NodeRow]:
    """A row for each linear that a region holds, named by its annotations."""
    for member in row.annotations.get("members") or ():
        if member.get("skip") is not None:
            yield replace(row, fqn=member["fqn"], annotations=member)


def _is_linear(row: NodeRow) -> bool:
    return row.target == LINEAR or row.annotations.get("skip") is not None


def _linears(history: History) -> dict[str, NodeRow]:
    """The row that says most about each linear, by layer; the last one that was seen."""
    found: dict[str, NodeRow] = {}
    for row in _all_rows(history):
        if _is_linear(row) or row.target == SWAPPED:
            found[row.fqn] = row
    return found


def _products(rows: Sequence[NodeRow]) -> dict[str, NodeRow]:
    """The node that computes each quantized linear in the end, by layer."""
    found: dict[str, NodeRow] = {}
    for row in rows:
        traits = traits_of(row.target)
        if traits is not None and traits.product:
            for member in row.annotations.get("members") or [{"fqn": row.fqn}]:
                found[member.get("fqn") or row.fqn] = row
    return found


def sizes(value: str) -> tuple[str, int, tuple[int, ...]]:
    """dtype, its bits, and the sizes of a value such as `float32[2, 64]`; symbolic sizes count 0."""
    match = _VALUE.match(value)
    if match is None:
        return "", 0, ()
    listed = [part.strip() for part in match["sizes"].split(",") if part.strip()]
    return match["dtype"], int(match["bits"]), tuple(int(p) if p.isdigit() else 0 for p in listed)


def _operand_sizes(row: NodeRow, values: Mapping[str, str], name: str) -> tuple[str, int, tuple[int, ...]]:
    """dtype, bits and sizes of an operand that is a node."""
    return sizes(values.get(row.operands.get(name, "").removeprefix("%"), ""))


def _weight_sizes(row: NodeRow, values: Mapping[str, str]) -> tuple[str, int, tuple[int, ...]]:
    """Those of the weight of a linear that was not swapped, in whatever spelling it was captured."""
    if row.target == LINEAR:
        return _operand_sizes(row, values, "weight")
    readers = row.annotations.get("readers")
    second = row.arguments[1] if len(row.arguments) > 1 else ""
    name = readers[0] if readers else second.rpartition("=")[2].removeprefix("%")
    return sizes(values.get(name, ""))


def _summary(
    row: NodeRow, values: Mapping[str, str], product: NodeRow | None, left: NodeRow | None
) -> LayerSummary:
    notes = row.annotations
    if row.target == SWAPPED:
        return _swapped(row, values, product)
    dtype, bits, shape = _weight_sizes(row, values)
    out_features, in_features = features_of(shape, sizes(row.value)[2]) if len(shape) == 2 else (0, 0)
    parameters = notes.get("parameters")
    scheme = QuantScheme.from_json(parameters) if parameters and product is not None else None
    policy = scheme.outliers if scheme is not None else None
    capacity = policy.capacity_for(in_features) if policy is not None else 0
    before = out_features * in_features * bits // 8
    return LayerSummary(
        fqn=row.fqn,
        role=notes.get("role") or "other",
        out_features=out_features,
        in_features=in_features,
        dtype=dtype,
        scheme=scheme.name if scheme is not None else None,
        weight_bits=scheme.weight.bits if scheme is not None else bits,
        recipe=str(scheme.recipe) if scheme is not None else "",
        activation_bits=scheme.activation.bits if scheme is not None and scheme.activation else bits,
        kernel=product.annotations.get("kernel") if product is not None else None,
        skip=None if scheme is not None else _why_left(left if left is not None else row),
        where=row.where,
        bytes_before=before,
        bytes_after=_packed_bytes(scheme.recipe, out_features, in_features, dtype, capacity)
        if scheme is not None
        else before,
        capacity=capacity,
        calibrated_columns=len(notes.get("outlier_columns") or ()),
    )


def _why_left(row: NodeRow) -> str:
    if row.annotations.get("skip"):
        return str(row.annotations["skip"])
    return NEVER_REWRITTEN if row.annotations.get("scheme") else NOT_LOOKED_AT


def _swapped(row: NodeRow, values: Mapping[str, str], product: NodeRow | None) -> LayerSummary:
    """The summary of a linear whose module was swapped before the capture; its recipe says its formats."""
    dtype, bits, shape = _operand_sizes(row, values, "x")
    recipe = LinearRecipe.parse(ast.literal_eval(row.operands["recipe"]))
    lists = [row.operands[name].strip("[]").split(", ") for name in ("weight", "state", "cache")]
    parts = {
        name: sizes(values.get(text.removeprefix("%"), ""))[2] for name, text in recipe.named(*lists).items()
    }
    in_features, out_features = (shape[-1] if shape else 0), parts["weight_codes"][0]
    capacity = parts["index"][0]
    return LayerSummary(
        fqn=row.fqn,
        role=row.annotations.get("role") or "other",
        out_features=out_features,
        in_features=in_features,
        dtype=dtype,
        scheme=_name_of(recipe, capacity),
        weight_bits=recipe.weight.format.bits,
        recipe=str(recipe.weight),
        activation_bits=recipe.activation.bits if recipe.activation is not None else bits,
        kernel=product.annotations.get("kernel") if product is not None else None,
        skip=None,
        where=row.where,
        bytes_before=out_features * in_features * bits // 8,
        bytes_after=_packed_bytes(recipe.weight, out_features, in_features, dtype, capacity),
        capacity=capacity,
    )


def _name_of(recipe: LinearRecipe, capacity: int) -> str:
    """Every scheme with these formats and, where there are slots, outlier columns; else the formats."""
    wanted = recipe.weight, recipe.activation, capacity > 0
    names = [
        scheme.name
        for scheme in map(get_scheme, scheme_names())
        if (scheme.recipe, scheme.activation, scheme.outliers is not None) == wanted
    ]
    formats = f"{recipe.weight} x {recipe.activation}" if recipe.activation else str(recipe.weight)
    return " or ".join(names) or formats


def _packed_bytes(
    recipe: WeightRecipe, out_features: int, in_features: int, dtype: str, capacity: int
) -> int:
    """Bytes of a quantized weight; `dtype` is the text of that of its activations."""
    found = getattr(torch, dtype, torch.float32)
    return packed_bytes(recipe, out_features, in_features, found, capacity)
