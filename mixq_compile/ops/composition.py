"""One quantized linear as a composition of operators: the only place that says which follows which.

Eager modules, measurements and passes all compose it here. What differs is `call`: `run_operator` computes,
a pass's writes a node. All steps read what is given in one dictionary, tensors or nodes by the names of
operands, of which an operator takes those that it has, and add what they return to it. One name means one
thing:

- `x`, and of the weight `weight_codes`, `weight_scale`, `outlier_weight`, `bias`, `cached_index`, `original`;
- the buffers of the outlier state, by STATE_FIELDS;
- `bits` of the activation's codes, `miss` (the policy's answer to an unknown column), `small_m`, `kernel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixq_compile.errors import unknown_name
from mixq_compile.ops import providers
from mixq_compile.ops.dequantize import dequantize
from mixq_compile.ops.mixed_gemm import mixed_gemm
from mixq_compile.ops.mixed_linear import mixed_linear
from mixq_compile.ops.operands import Signature, signature_of
from mixq_compile.ops.quantize import quantize
from mixq_compile.ops.quantize_online import quantize_online
from mixq_compile.ops.refresh_outlier_weights import refresh_outlier_weights
from mixq_compile.ops.shared_declarations import QUANTIZED
from mixq_compile.ops.traits import Traits, traits_of
from mixq_compile.ops.weight_codes import weight_bits
from mixq_compile.ops.weight_only_linear import weight_only_linear

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

    @classmethod
    def of(cls, operator: Any) -> Step:
        """The step that a custom operator is."""
        overload = operator._opoverload
        traits = traits_of(overload)
        assert traits is not None, f"{overload} has not been declared"
        return cls(overload, traits, signature_of(overload))


Call = Callable[[Step, Mapping[str, Any]], Any]
"""`call(step, given)`: the result, or a tuple of the results."""

QUANTIZE = Step.of(quantize)
QUANTIZE_ONLINE = Step.of(quantize_online)
REFRESH = Step.of(refresh_outlier_weights)
MIXED_GEMM = Step.of(mixed_gemm)
DEQUANTIZE = Step.of(dequantize)
MIXED_LINEAR = Step.of(mixed_linear)
WEIGHT_ONLY = Step.of(weight_only_linear)
STEPS = (QUANTIZE, QUANTIZE_ONLINE, REFRESH, MIXED_GEMM, DEQUANTIZE, MIXED_LINEAR, WEIGHT_ONLY)


def run_operator(step: Step, given: Mapping[str, Any]) -> Any:
    """Computes: the `call` of eager modules and of measurements."""
    return step.operator(*step.signature.pick(given))


def run_kernel(step: Step, given: Mapping[str, Any]) -> Any:
    """Computes without the operator: for operands that are known to fit, and caches that are this call's."""
    *arguments, kernel = step.signature.pick(given)
    source = given[step.traits.source]
    tensor = source[0] if isinstance(source, list) else source
    bits = weight_bits(given["weight_codes"]) if step.traits.product else 8
    return providers.run(step.traits.name, kernel, tensor, bits, *arguments)


def check_taken(names: Iterable[str]) -> None:
    """Raises OptionError where no operator of a composition takes an operand of this name."""
    taken = {name for step in STEPS for name in step.signature.names}
    for name in names:
        if name not in taken:
            raise unknown_name("operand of a quantized linear", name, taken)


def quantized(given: Given, call: Call = run_operator) -> Given:
    """Adds `codes`, `scale`, `outliers` and `count` of x."""
    if given["miss"] == STATIC:
        given["count"] = given["counters"]
        given.update(zip(QUANTIZED, call(QUANTIZE, given), strict=True))
    else:
        given.update(zip(QUANTIZE_ONLINE.traits.results, call(QUANTIZE_ONLINE, given), strict=True))
    return given


def refreshed(given: Given, call: Call = run_operator) -> Given:
    """Fetches the weights of the outlier columns that the state has learned; adds nothing."""
    call(REFRESH, {**given, **{name: [given[name]] for name in REFRESH.traits.each}})
    return given


def multiplied(given: Given, call: Call = run_operator) -> Any:
    """The product of what was quantized, dequantized in the same kernel: `[..., N]`."""
    return call(MIXED_LINEAR, given)


def multiplied_in_steps(given: Given, call: Call = run_operator) -> Any:
    """The same by two operators, the product and its dequantization, which passes see and fuse."""
    given.update(zip(MIXED_GEMM.traits.results, call(MIXED_GEMM, given), strict=True))
    return call(DEQUANTIZE, given)


def weight_only(given: Given, call: Call = run_operator) -> Any:
    """The product of an x that stays in 16 or 32 bit: `[..., N]`."""
    return call(WEIGHT_ONLY, given)


def compose(given: Given, call: Call = run_operator, *, refreshes: bool, fused: bool = True) -> Any:
    """A whole quantized linear `[..., K] -> [..., N]`: quantize, refresh where there are slots, multiply.

    `fused`: by one operator, else by two. Raises PipelineError where an operand is missing.
    """
    quantized(given, call)
    if refreshes:
        refreshed(given, call)
    return multiplied(given, call) if fused else multiplied_in_steps(given, call)
