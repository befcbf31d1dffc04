"""Runs circuits of `rtl` on test vectors with Icarus Verilog and compares them with numpy, bit by bit."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixq_compile.area.reference_arithmetic import Bits
from mixq_compile.area.synthesis import Circuit, SynthesisError, program, sources

PACKAGE = "iverilog"
DIGIT = 4
"""Bits of a hexadecimal digit."""
WARM_UP = 2
"""Cycles of the first vector before it counts: registers have no reset and start unknown."""


@dataclass(frozen=True)
class Port:
    """An input or output: so many lanes of so many bits."""

    name: str
    bits: int
    lanes: int = 1

    @property
    def width(self) -> int:
        """Bits of all lanes."""
        return self.bits * self.lanes


@dataclass(frozen=True)
class Case:
    """A circuit, vectors for its inputs, and what its outputs must be."""

    circuit: Circuit
    inputs: Mapping[Port, Bits]
    """Vectors × lanes."""
    outputs: Mapping[Port, Bits]
    clocked: bool = False
    """Outputs are read after the clock's edge at which a vector was there."""


@dataclass(frozen=True)
class Mismatch:
    """An output that is not what numpy computes."""

    circuit: Circuit
    vector: int
    inputs: dict[str, list[str]]
    output: str
    lane: int
    expected: str
    found: str

    def __str__(self) -> str:
        given = ", ".join(f"{name} = {' '.join(values)}" for name, values in self.inputs.items())
        return (
            f"{self.circuit}: vector {self.vector} ({given}) gives {self.output}[{self.lane}] = {self.found} "
            f"instead of {self.expected}"
        )


def simulate(case: Case) -> list[Mismatch]:
    """Every output that differs from what is expected, in the order of the vectors.

    Raises ProgramMissing where Icarus Verilog is absent, and SynthesisError where it rejects the circuit.
    """
    lines = _outputs(case)
    mismatches = []
    for place, (port, expected) in enumerate(case.outputs.items()):
        for vector, row in enumerate(expected):
            text = lines[vector][place]
            for lane, value in enumerate(row):
                found = _lane(text, port, lane)
                wanted = f"{int(value):0{-(-port.bits // DIGIT)}x}"
                if found != wanted:
                    given = {
                        one.name: [f"{int(item):x}" for item in values[vector]]
                        for one, values in case.inputs.items()
                    }
                    mismatches.append(Mismatch(case.circuit, vector, given, port.name, lane, wanted, found))
    return sorted(mismatches, key=lambda one: one.vector)


def _lane(text: str, port: Port, lane: int) -> str:
    """The hexadecimal digits of one lane; unknown bits stay visible."""
    if set(text.lower()) & {"x", "z"}:
        return text
    value = int(text, 16) >> lane * port.bits & (1 << port.bits) - 1
    return f"{value:0{-(-port.bits // DIGIT)}x}"


def _outputs(case: Case) -> list[list[str]]:
    """Of each vector, the digits of each output."""
    compiler, runner = program("iverilog", PACKAGE), program("vvp", PACKAGE)
    count = len(next(iter(case.inputs.values())))
    with tempfile.TemporaryDirectory(prefix="mixq_area_") as folder:
        bench, vectors, binary = (Path(folder) / name for name in ("bench.v", "vectors.hex", "bench"))
        bench.write_text(_bench(case, count, vectors))
        vectors.write_text("\n".join(_packed(case.inputs, vector) for vector in range(count)) + "\n")
        files = [str(path) for path in [*sources(), bench]]
        for command in ([compiler, "-g2005-sv", "-s", "bench", "-o", str(binary), *files],
                        [runner, "-n", str(binary)]):  # fmt: skip
            outcome = subprocess.run(command, capture_output=True, text=True, check=False)
            if outcome.returncode:
                raise SynthesisError(
                    f"{case.circuit} could not be simulated: {Path(command[0]).name} ended with "
                    f"{outcome.returncode}:\n{(outcome.stderr or outcome.stdout)[-2000:]}"
                )
    return [line.split() for line in outcome.stdout.splitlines() if line]


def _packed(inputs: Mapping[Port, Bits], vector: int) -> str:
    """All inputs of a vector as one number, the first port in the lowest bits."""
    total, place = 0, 0
    for port, values in inputs.items():
        for value in values[vector]:
            total |= int(value) << place
            place += port.bits
    return f"{total:x}"


def _bench(case: Case, count: int, vectors: Path) -> str:
    """A module that applies each vector and prints the outputs."""
    width = sum(port.width for port in case.inputs)
    connections, place = ([".clock(clock)"] if case.clocked else []), 0
    for port in case.inputs:
        connections.append(f".{port.name}(vector[{place + port.width - 1}:{place}])")
        place += port.width
    connections += [f".{port.name}({port.name}_out)" for port in case.outputs]
    edge = "clock = 1; #1;" if case.clocked else ""
    digits = " ".join("%h" for _ in case.outputs)
    values = ", ".join(f"{port.name}_out" for port in case.outputs)
    return "\n".join(
        [
            "module bench;",
            "reg clock = 0;",
            "integer i;",
            f"reg [{width - 1}:0] vectors [0:{count - 1}];",
            f"reg [{width - 1}:0] vector;",
            *(f"wire [{port.width - 1}:0] {port.name}_out;" for port in case.outputs),
            case.circuit.instance("circuit", ", ".join(connections)),
            f'initial begin $readmemh("{vectors}", vectors);',
            f"for (i = {-WARM_UP if case.clocked else 0}; i < {count}; i = i + 1) begin",
            f"vector = vectors[i < 0 ? 0 : i]; #1; {edge}",
            f'if (i >= 0) $display("{digits}", {values}); clock = 0; #1;',
            "end $finish; end endmodule",
            "",
        ]
    )


FP16_CORNERS = (
    0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x8400, 0x07FF, 0x3800, 0x3801, 0x3BFF, 0x3C00, 0xBC00, 0x3C01,
    0x4100, 0x57F0, 0xD800, 0x6400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x1400, 0x4600,
)  # fmt: skip
"""Zeros, subnormals, the least and largest numbers, ties, infinities, NaN, and 6, the usual threshold."""
FP32_CORNERS = (
    0x00000000, 0x80000000, 0x00000001, 0x00800000, 0x80800001, 0x3F800000, 0xBF800000, 0x3F800001,
    0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x33800000, 0x4B800000, 0x38800000,
)  # fmt: skip


class Vectors:
    """Random test vectors with corners among them, the same ones for the same seed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.random = np.random.default_rng(seed)

    def first(self) -> Bits:
        """A flag that is set in the first cycle and rarely later."""
        flags = (self.random.random((self.count, 1)) < 0.1).astype(np.int64)
        flags[0] = 1
        return flags

    def integers(self, bits: int, lanes: int = 1) -> Bits:
        """Patterns of so many bits, the extreme ones often."""
        values = self.random.integers(0, 1 << bits, (self.count, lanes))
        # Small magnitudes too, which wide random patterns would never have.
        shifted = values >> self.random.integers(0, bits, values.shape)
        corners = (0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1)
        return self._mixed((values, shifted, self._chosen(corners, lanes)), (0.4, 0.4, 0.2))

    def halves(self, lanes: int = 1, *, finite: bool = False, spread: int = 31) -> Bits:
        """fp16: any pattern, numbers with near exponents (at most `spread` apart), and corners."""
        shape = (self.count, lanes)
        anything = self.random.integers(0, 1 << 16, shape)
        centre = self.random.integers(3, 29, (self.count, 1))
        exponents = np.clip(centre + self.random.integers(-3, 4, shape), 0, 30)
        near = self.random.integers(0, 2, shape) << 15 | exponents << 10 | anything & 1023
        values = self._mixed((anything, near, self._chosen(FP16_CORNERS, lanes)), (0.3, 0.5, 0.2))
        if finite or spread < 31:
            low = (31 - spread) // 2
            values = values & 0x83FF | np.clip(values >> 10 & 31, low, min(low + spread, 30)) << 10
        return values

    def singles(self) -> Bits:
        """fp32: any pattern, numbers with near exponents, and corners."""
        anything = self.random.integers(0, 1 << 32, (self.count, 1))
        near = anything & 0x807FFFFF | self.random.integers(110, 145, (self.count, 1)) << 23
        return self._mixed((anything, near, self._chosen(FP32_CORNERS, 1)), (0.3, 0.5, 0.2))

    def _chosen(self, corners: Sequence[int], lanes: int) -> Bits:
        return self.random.choice(np.asarray(corners, np.int64), (self.count, lanes))

    def _mixed(self, kinds: Sequence[Bits], shares: Sequence[float]) -> Bits:
        picked = self.random.choice(len(kinds), kinds[0].shape, p=shares)
        return np.choose(picked, kinds)
