"""Test vectors for every circuit of `rtl`, with what numpy makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixq_compile.area import reference_arithmetic as reference
from mixq_compile.area.reference_arithmetic import Bits
from mixq_compile.area.simulation import Case, Port, Vectors
from mixq_compile.area.synthesis import circuit
from mixq_compile.errors import unknown_name

HALF, SINGLE = 16, 32
EXPONENT = 8
OFFSET = 30
"""Of mxint_to_fp16's exponents."""


def case(name: str, count: int = 64, seed: int = 0, **parameters: int) -> Case:
    """The test vectors of a circuit: its module's name, how many, and its parameters as in Verilog.

    Raises OptionError for a name that no circuit has.
    """
    if name not in _CASES:
        raise unknown_name("circuit", name, _CASES)
    return _CASES[name](Vectors(count, seed), **parameters)


def names() -> tuple[str, ...]:
    """Every circuit that has test vectors."""
    return tuple(_CASES)


def _half(name: str, lanes: int = 1) -> Port:
    return Port(name, HALF, lanes)


def _mul(vectors: Vectors, N: int = 8, M: int = 8) -> Case:
    a, b = vectors.integers(N), vectors.integers(M)
    product = reference.pattern(reference.signed(a, N) * reference.signed(b, M), N + M)
    ports = {Port("a", N): a, Port("b", M): b}
    return Case(circuit("mul", N=N, M=M), ports, {Port("y", N + M): product})


def _add(vectors: Vectors, N: int = 16) -> Case:
    a, b = vectors.integers(N), vectors.integers(N)
    return Case(
        circuit("add", N=N), {Port("a", N): a, Port("b", N): b}, {Port("y", N): reference.pattern(a + b, N)}
    )


def _accumulate(vectors: Vectors, N: int = 24) -> Case:
    first, x = vectors.first(), vectors.integers(N)
    sums = reference.running(first, x[:, 0].tolist(), lambda total, term: total + term, 0)
    return Case(
        circuit("accumulate", N=N), {Port("first", 1): first, Port("x", N): x},
        {Port("sum", N): reference.pattern(sums, N)[:, None]}, clocked=True,
    )  # fmt: skip


def _register(vectors: Vectors, N: int = 16) -> Case:
    d = vectors.integers(N)
    return Case(circuit("register", N=N), {Port("d", N): d}, {Port("q", N): d}, clocked=True)


def _add_tree(vectors: Vectors, L: int = 16, W: int = 16) -> Case:
    x = vectors.integers(W, L)
    bits = W + (L - 1).bit_length()
    total = reference.pattern(reference.signed(x, W).sum(axis=1, keepdims=True), bits)
    return Case(circuit("add_tree", L=L, W=W), {Port("x", W, L): x}, {Port("y", bits): total})


def _halves(name: str, compute: Callable[..., Bits], operands: str) -> Callable[[Vectors], Case]:
    """A circuit from fp16 to fp16."""

    def build(vectors: Vectors) -> Case:
        values = [vectors.halves() for _ in operands]
        inputs = {_half(operand): value for operand, value in zip(operands, values, strict=True)}
        return Case(circuit(name), inputs, {_half("y"): compute(*values)})

    return build


def _fp32_add(vectors: Vectors) -> Case:
    a, b = vectors.singles(), vectors.singles()
    total = reference.add_single(reference.single(a), reference.single(b))
    return Case(circuit("fp32_add"), {Port("a", SINGLE): a, Port("b", SINGLE): b}, {Port("y", SINGLE): total})


def _fp16_mac_fp32(vectors: Vectors) -> Case:
    a, b, c = vectors.halves(), vectors.halves(), vectors.singles()
    return Case(
        circuit("fp16_mac_fp32"), {_half("a"): a, _half("b"): b, Port("c", SINGLE): c},
        {Port("y", SINGLE): reference.multiply_add_single(a, b, c)},
    )  # fmt: skip


def _int_to_fp16(vectors: Vectors, N: int = 8) -> Case:
    x = vectors.integers(N)
    y = reference.to_half(reference.signed(x, N).astype(np.float64))
    return Case(circuit("int_to_fp16", N=N), {Port("x", N): x}, {_half("y"): y})


def _fp16_to_int(vectors: Vectors, N: int = 8) -> Case:
    x = vectors.halves()
    return Case(circuit("fp16_to_int", N=N), {_half("x"): x}, {Port("y", N): reference.to_integer(x, N)})


def _dequant(vectors: Vectors, N: int = 4, ASYMMETRIC: int = 1) -> Case:
    q, zero, scale = vectors.integers(N), vectors.integers(N), vectors.halves()
    y = reference.dequantize(q, zero, scale, N, bool(ASYMMETRIC))
    return Case(
        circuit("dequant", N=N, ASYMMETRIC=ASYMMETRIC),
        {Port("q", N): q, Port("zero", N): zero, _half("scale"): scale}, {_half("y"): y},
    )  # fmt: skip


def _quant(vectors: Vectors, N: int = 8) -> Case:
    x, inverse = vectors.halves(), vectors.halves()
    q = reference.to_integer(reference.multiply(x, inverse), N)
    return Case(circuit("quant", N=N), {_half("x"): x, _half("inverse_scale"): inverse}, {Port("q", N): q})


def _gather(vectors: Vectors, N: int = 32) -> Case:
    x, scale, y = vectors.integers(N), vectors.halves(), vectors.halves()
    out = reference.gather(x, scale, y, N)
    return Case(
        circuit("gather", N=N), {Port("x", N): x, _half("scale"): scale, _half("y"): y}, {_half("out"): out}
    )


def _compare_demux(vectors: Vectors) -> Case:
    x, threshold = vectors.halves(), vectors.halves() & 0x7FFF
    high = (x & 0x7FFF) >= threshold
    return Case(
        circuit("compare_demux"), {_half("x"): x, _half("threshold"): threshold},
        {Port("is_high", 1): high.astype(np.int64), _half("high"): x * high, _half("low"): x * ~high},
    )  # fmt: skip


def _mxint_cast(vectors: Vectors, N: int = 8, LANES: int = 16) -> Case:
    x = vectors.halves(LANES)
    return Case(
        circuit("mxint_cast", N=N, LANES=LANES), {_half("x", LANES): x},
        {Port("exponent", 5): reference.shared_exponent(x),
         Port("mantissas", N, LANES): reference.mantissas(x, N)},
    )  # fmt: skip


def _mxint_to_fp16(vectors: Vectors, N: int = 24) -> Case:
    x, exponent = vectors.integers(N), vectors.integers(9) % 60
    value = np.ldexp(reference.signed(x, N).astype(np.float64), (exponent - OFFSET).astype(np.int32))
    return Case(
        circuit("mxint_to_fp16", N=N), {Port("x", N): x, Port("exponent", 9): exponent},
        {_half("y"): reference.to_half(value)},
    )  # fmt: skip


def _fixed_dot(vectors: Vectors, LANES: int = 16, N: int = 8, M: int = 8, GROWTH: int = 8) -> Case:
    first, w, x = vectors.first(), vectors.integers(N, LANES), vectors.integers(M, LANES)
    bits = N + M + (LANES - 1).bit_length() + GROWTH
    return Case(
        circuit("fixed_dot", LANES=LANES, N=N, M=M, GROWTH=GROWTH),
        {Port("first", 1): first, Port("w", N, LANES): w, Port("x", M, LANES): x},
        {Port("sum", bits): reference.fixed_dot(first, w, x, (N, M, bits))}, clocked=True,
    )  # fmt: skip


def _float_dot(vectors: Vectors, LANES: int = 16) -> Case:
    first, w, x = vectors.first(), vectors.halves(LANES, spread=8), vectors.halves(LANES, spread=8)
    return Case(
        circuit("float_dot", LANES=LANES),
        {Port("first", 1): first, _half("w", LANES): w, _half("x", LANES): x},
        {_half("sum"): reference.half_dot(first, w, x)}, clocked=True,
    )  # fmt: skip


def _mxint_dot(vectors: Vectors, LANES: int = 16, N: int = 8, M: int = 8, GROWTH: int = 8) -> Case:
    first, w, x = vectors.first(), vectors.integers(N, LANES), vectors.integers(M, LANES)
    w_exponent, x_exponent = vectors.integers(EXPONENT), vectors.integers(EXPONENT)
    bits = N + M + (LANES - 1).bit_length() + GROWTH
    sums, exponents = reference.block_dot(first, w, x, w_exponent + x_exponent, (N, M, bits))
    return Case(
        circuit("mxint_dot", LANES=LANES, N=N, M=M, GROWTH=GROWTH),
        {Port("first", 1): first, Port("w", N, LANES): w, Port("w_exponent", EXPONENT): w_exponent,
         Port("x", M, LANES): x, Port("x_exponent", EXPONENT): x_exponent},
        {Port("sum", bits): sums, Port("sum_exponent", EXPONENT + 1): exponents}, clocked=True,
    )  # fmt: skip


def _weight_only_linear(vectors: Vectors, LANES: int = 16, N: int = 4, ASYMMETRIC: int = 1) -> Case:
    first, w, x = vectors.first(), vectors.integers(N, LANES), vectors.halves(LANES, spread=8)
    # Scale and zero point are registered, so that they act a cycle later; constant ones do not show it.
    zero, scale = (np.repeat(one[:1], vectors.count, axis=0) for one in (
        vectors.integers(N), vectors.halves(spread=4)
    ))  # fmt: skip
    values = reference.dequantize(w, zero, scale, N, bool(ASYMMETRIC))
    sums = reference.half_dot(first, values, x)
    return Case(
        circuit("weight_only_linear", LANES=LANES, N=N, ASYMMETRIC=ASYMMETRIC),
        {Port("first", 1): first, Port("w", N, LANES): w, _half("x", LANES): x, Port("zero", N): zero,
         _half("scale"): scale},
        {_half("sum"): sums}, clocked=True,
    )  # fmt: skip


def _mixed_linear(
    vectors: Vectors, LANES: int = 16, N: int = 8, M: int = 8, GROWTH: int = 8, CASTS_WEIGHT: int = 1
) -> Case:
    bits = N + M + (LANES - 1).bit_length() + GROWTH
    first, threshold = vectors.first(), vectors.halves(spread=8) & 0x7FFF
    x, w = vectors.halves(LANES, spread=8), vectors.halves(LANES, spread=8)
    codes, buffered = vectors.integers(N, LANES), vectors.integers(bits, LANES)
    x_inverse, w_inverse = vectors.halves(spread=8), vectors.halves(spread=8)
    scales, buffered_high = vectors.halves(LANES), vectors.halves(LANES)
    high = (x & 0x7FFF) >= threshold
    x_codes = reference.to_integer(reference.multiply(x * ~high, x_inverse), M)
    w_codes = reference.to_integer(reference.multiply(w, w_inverse), N) if CASTS_WEIGHT else codes
    return Case(
        circuit("mixed_linear", LANES=LANES, N=N, M=M, GROWTH=GROWTH, CASTS_WEIGHT=CASTS_WEIGHT),
        {Port("first", 1): first, _half("x", LANES): x, _half("threshold"): threshold,
         _half("x_inverse_scale"): x_inverse, _half("w_high", LANES): w, Port("w_codes", N, LANES): codes,
         _half("w_inverse_scale"): w_inverse, Port("buffered", bits, LANES): buffered,
         _half("buffered_high", LANES): buffered_high, _half("scales", LANES): scales},
        {Port("is_high", 1, LANES): high.astype(np.int64),
         Port("sum", bits): reference.fixed_dot(first, w_codes, x_codes, (N, M, bits)),
         _half("high_sum"): reference.half_dot(first, w, x * high),
         _half("y", LANES): reference.gather(buffered, scales, buffered_high, bits)},
        clocked=True,
    )  # fmt: skip


_CASES: dict[str, Callable[..., Case]] = {
    "mul": _mul,
    "add": _add,
    "register": _register,
    "accumulate": _accumulate,
    "add_tree": _add_tree,
    "fp16_mul": _halves("fp16_mul", reference.multiply, "ab"),
    "fp16_add": _halves("fp16_add", reference.add, "ab"),
    "fp16_mac_fp16": _halves(
        "fp16_mac_fp16", lambda a, b, c: reference.add(reference.multiply(a, b), c), "abc"
    ),
    "fp32_add": _fp32_add,
    "fp16_mac_fp32": _fp16_mac_fp32,
    "int_to_fp16": _int_to_fp16,
    "fp16_to_int": _fp16_to_int,
    "dequant": _dequant,
    "quant": _quant,
    "gather": _gather,
    "compare_demux": _compare_demux,
    "mxint_cast": _mxint_cast,
    "mxint_to_fp16": _mxint_to_fp16,
    "fixed_dot": _fixed_dot,
    "float_dot": _float_dot,
    "mxint_dot": _mxint_dot,
    "weight_only_linear": _weight_only_linear,
    "mixed_linear": _mixed_linear,
}
