"""One quantized linear as a composition of operators: the only place that says which follows which.

Eager modules, measurements and passes all compose it here. What differs is `call`: `run_operator` computes,
a pass's writes a node. All steps read what is given in one dictionary, tensors or nodes by the names of
operands, of which an operator takes those that it has, and add what they return to it. One name means one
thing:

- `x`, and of the weight `weight_codes`, `weight_scale`, `outlier_weight`, `bias`, `cached_index`, `original`;
- where a weight has them, `weight_zero`, `weight_sums` (sums of codes: its activations have zero points), the
  low-rank factors `left` and `right`, and `weight_format`, the text of a format that codes do not tell;
- the buffers of the outlier state, by STATE_FIELDS;
- `format` of the activation's codes, `miss` (the policy's answer to an unknown column), `small_m`, `kernel`;
- `row_mask`, where some rows teach nothing; `addend`, what is added to the result `[..., N]`; where a linear
  is weight-only also `weight_zero` and `weight_format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixq_compile.errors import unknown_name
from mixq_compile.ops import providers
from mixq_compile.ops.dequantize import dequantize
from mixq_compile.ops.grouped_linear import grouped_linear
from mixq_compile.ops.mixed_gemm import mixed_gemm
from mixq_compile.ops.mixed_linear import mixed_linear
from mixq_compile.ops.operands import Signature, signature_of
from mixq_compile.ops.quantize import quantize
from mixq_compile.ops.quantize_affine import quantize_affine
from mixq_compile.ops.quantize_online import quantize_online
from mixq_compile.ops.refresh_outlier_weights import refresh_outlier_weights
from mixq_compile.ops.traits import Traits, traits_of
from mixq_compile.ops.weight_codes import format_name
from mixq_compile.ops.weight_only_linear import weight_only_linear

aten = torch.ops.aten

STATIC = "static"
"""The miss policy that never learns a column."""

Given = dict[str, Any]
"""Tensors or nodes, and options, by the names of operands."""


@dataclass(frozen=True)
class Step:
    """An operator of the composition, with what is asked about it in every call."""

    operator: Any
    """The overload."""
    traits: Traits
    signature: Signature
    in_hot_path: bool = True
    """Whether `run_kernel` goes past the operator."""

    @classmethod
    def of(cls, operator: Any, *, in_hot_path: bool = True) -> Step:
        """The step that a custom operator is."""
        overload = operator._opoverload
        traits = traits_of(overload)
        assert traits is not None, f"{overload} has not been declared"
        return cls(overload, traits, signature_of(overload), in_hot_path)

    @classmethod
    def foreign(cls, operator: Any) -> Step:
        """The step that an operator of torch is."""
        return cls(operator, Traits(operator._schema.name), signature_of(operator), in_hot_path=False)


Call = Callable[[Step, Mapping[str, Any]], Any]
"""`call(step, given)`: the result, or a tuple of the results."""

QUANTIZE = Step.of(quantize)
QUANTIZE_ONLINE = Step.of(quantize_online)
QUANTIZE_AFFINE = Step.of(quantize_affine, in_hot_path=False)
REFRESH = Step.of(refresh_outlier_weights)
MIXED_GEMM = Step.of(mixed_gemm)
DEQUANTIZE = Step.of(dequantize)
MIXED_LINEAR = Step.of(mixed_linear)
GROUPED_LINEAR = Step.of(grouped_linear, in_hot_path=False)
WEIGHT_ONLY = Step.of(weight_only_linear)
STEPS = (
    QUANTIZE, QUANTIZE_ONLINE, QUANTIZE_AFFINE, REFRESH, MIXED_GEMM, DEQUANTIZE, MIXED_LINEAR, GROUPED_LINEAR,
    WEIGHT_ONLY,
)  # fmt: skip
MATMUL, MULTIPLY, SUBTRACT, NEGATE, UNSQUEEZE, SUM = map(
    Step.foreign,
    (
        aten.matmul.default, aten.mul.Tensor, aten.sub.Tensor, aten.neg.default, aten.unsqueeze.default,
        aten.sum.dim_IntList,
    ),
)  # fmt: skip
"""Torch's own arithmetic, of which addends are made."""
WEIGHT_PARTS = ("left", "right", "weight_sums")
"""Parts of a weight of which addends are made: no operator of `STEPS` takes them."""


def run_operator(step: Step, given: Mapping[str, Any]) -> Any:
    """Computes: the `call` of eager modules and of measurements."""
    if step.signature.keyword_only or len(step.signature.positional) < 2:
        args, kwargs = step.signature.arrange(step.signature.select(given))
        return step.operator(*args, **kwargs)
    return step.operator(*step.signature.pick(given))


def run_kernel(step: Step, given: Mapping[str, Any]) -> Any:
    """Computes without the operator: for operands that are known to fit, and caches that are this call's."""
    if not step.in_hot_path:
        return run_operator(step, given)
    signature = step.signature
    arguments = signature.pick(given)
    required = arguments[: signature.required]
    source = given[step.traits.source]
    tensor = source[0] if isinstance(source, list) else source
    weight = providers.ANY_WEIGHT
    if step.traits.product:
        weight = given.get("weight_format") or format_name(given["weight_codes"])
    activation = given["format"] if step.traits.quantizes else providers.ANY_ACTIVATION
    call = (step.traits.name, required[-1], tensor, weight, activation, *required[:-1])
    if len(arguments) == len(required):
        return providers.run(*call)
    names = signature.positional[len(required) :]
    optional = dict(zip(names, arguments[len(required) :], strict=False))
    optional = {name: value for name, value in optional.items() if value is not signature.defaults[name]}
    return providers.run_with(optional, *call) if optional else providers.run(*call)


def check_taken(names: Iterable[str]) -> None:
    """Raises OptionError where no operator of a composition takes an operand of this name."""
    taken = {*WEIGHT_PARTS, *(name for step in STEPS for name in step.signature.names)}
    for name in names:
        if name not in taken:
            raise unknown_name("operand of a quantized linear", name, taken)


def quantized(given: Given, call: Call = run_operator) -> Given:
    """Adds `codes`, `scale`, `outliers` and `count` of x, and its `zero` points where the format has some."""
    if given["miss"] != STATIC:
        given.update(zip(QUANTIZE_ONLINE.traits.results, call(QUANTIZE_ONLINE, given), strict=True))
        return given
    step = QUANTIZE_AFFINE if "weight_sums" in given else QUANTIZE
    given["count"] = given["counters"]
    given.update(zip(step.traits.results, call(step, given), strict=True))
    return given


def corrected(given: Given, call: Call = run_operator) -> Given:
    """Adds `addend` `[..., N]`: the low-rank part, and what zero points of the activation are corrected by.

    `(x·left)·right - (scale * zero) ⊗ Σ_g weight_scale_g * weight_sums_g`, where a weight has the parts.
    """
    addend = None
    if "left" in given:
        inner = call(MATMUL, {"self": given["x"], "other": given["left"]})  # [..., r]
        addend = call(MATMUL, {"self": inner, "other": given["right"]})
    if "weight_sums" in given and "zero" in given:
        shift = call(MULTIPLY, {"self": given["scale"], "other": given["zero"]})  # [...]
        shift = call(UNSQUEEZE, {"self": shift, "dim": -1})
        sums = call(MULTIPLY, {"self": given["weight_scale"], "other": given["weight_sums"]})
        if "/" in given.get("weight_format", ""):
            sums = call(SUM, {"self": sums, "dim": [-1]})  # [N, G] -> [N]
        shift = call(MULTIPLY, {"self": shift, "other": sums})  # [..., N]
        negative = {"self": shift} if addend is None else {"self": addend, "other": shift}
        addend = call(NEGATE if addend is None else SUBTRACT, negative)
    if addend is not None:
        given["addend"] = addend
    return given


def refreshed(given: Given, call: Call = run_operator) -> Given:
    """Fetches the weights of the outlier columns that the state has learned; adds nothing."""
    call(REFRESH, {**given, **{name: [given[name]] for name in REFRESH.traits.each}})
    return given


def multiplied(given: Given, call: Call = run_operator) -> Any:
    """The product of what was quantized, dequantized in the same kernel: `[..., N]`."""
    corrected(given, call)
    if "weight_format" not in given:
        return call(MIXED_LINEAR, given)
    return call(GROUPED_LINEAR, {"weight_zero": None, "addend": None, **given})


def multiplied_in_steps(given: Given, call: Call = run_operator) -> Any:
    """The same by two operators, the product and its dequantization, which passes see and fuse.

    By one where the format of the weight has no other.
    """
    if "weight_format" in given:
        return multiplied(given, call)
    corrected(given, call)
    given.update(zip(MIXED_GEMM.traits.results, call(MIXED_GEMM, given), strict=True))
    return call(DEQUANTIZE, given)


def weight_only(given: Given, call: Call = run_operator) -> Any:
    """The product of an x that stays in 16 or 32 bit: `[..., N]`."""
    corrected(given, call)
    return call(WEIGHT_ONLY, given)


def compose(given: Given, call: Call = run_operator, *, refreshes: bool, fused: bool = True) -> Any:
    """A whole quantized linear `[..., K] -> [..., N]`: quantize, refresh where there are slots, multiply.

    `fused`: by one operator, else by two. Raises PipelineError where an operand is missing.
    """
    quantized(given, call)
    if refreshes:
        refreshed(given, call)
    return multiplied(given, call) if fused else multiplied_in_steps(given, call)
