"""The circuits compute what numpy computes, and synthesis measures them as it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixq_compile.area import synthesis
from mixq_compile.area.synthesis import ProgramMissing, circuit, library_path, sources, synthesise
from mixq_compile.area.unit_circuits import CIRCUITS, FITTED, TABLE, dumped, unit_circuit
from mixq_compile.area.validation import BOUNDS, HELD_OUT, Row, as_text
from mixq_compile.errors import OptionError

simulated_circuits = pytest.importorskip("mixq_compile.area.simulated_circuits", reason="needs numpy")
from mixq_compile.area.simulation import Case, Port, simulate  # noqa: E402

needs_simulator = pytest.mark.skipif(
    shutil.which("iverilog") is None, reason="needs Icarus Verilog (apt-get install iverilog)"
)


def _measures() -> bool:
    try:
        synthesis.program("yosys", "yosys")
        library_path()
    except ProgramMissing:
        return False
    return True


needs_synthesis = pytest.mark.skipif(
    not _measures(), reason="needs yosys and its library (apt-get install yosys qflow-tech-osu018)"
)

OTHER_WIDTHS = [
    ("mul", {"N": 5, "M": 7}),
    ("mul", {"N": 2, "M": 16}),
    ("add", {"N": 3}),
    ("add_tree", {"L": 5, "W": 3}),
    ("add_tree", {"L": 1, "W": 4}),
    ("int_to_fp16", {"N": 2}),
    ("int_to_fp16", {"N": 4}),
    ("int_to_fp16", {"N": 5}),
    ("int_to_fp16", {"N": 32}),
    ("int_to_fp16", {"N": 48}),
    ("fp16_to_int", {"N": 2}),
    ("fp16_to_int", {"N": 4}),
    ("fp16_to_int", {"N": 12}),
    ("fp16_to_int", {"N": 16}),
    ("dequant", {"N": 2, "ASYMMETRIC": 0}),
    ("dequant", {"N": 2, "ASYMMETRIC": 1}),
    ("dequant", {"N": 8, "ASYMMETRIC": 0}),
    ("dequant", {"N": 8, "ASYMMETRIC": 1}),
    ("quant", {"N": 4}),
    ("gather", {"N": 12}),
    ("gather", {"N": 48}),
    ("mxint_cast", {"N": 2}),
    ("mxint_cast", {"N": 6, "LANES": 5}),
    ("mxint_cast", {"N": 12}),
    ("fixed_dot", {"LANES": 5, "N": 4, "M": 3, "GROWTH": 0}),
    ("float_dot", {"LANES": 3}),
    ("mxint_dot", {"LANES": 3, "N": 4, "M": 6, "GROWTH": 0}),
    ("weight_only_linear", {"LANES": 4, "N": 2, "ASYMMETRIC": 0}),
    ("mixed_linear", {"LANES": 4, "N": 4, "M": 4, "CASTS_WEIGHT": 0}),
]


@needs_simulator
@pytest.mark.parametrize("name", simulated_circuits.names())
def test_every_circuit_computes_what_numpy_does(name: str) -> None:
    assert simulate(simulated_circuits.case(name, 100, seed=1)) == []


@needs_simulator
@pytest.mark.parametrize(("name", "parameters"), OTHER_WIDTHS, ids=str)
def test_other_widths_compute_what_numpy_does(name: str, parameters: dict[str, int]) -> None:
    assert simulate(simulated_circuits.case(name, 100, seed=2, **parameters)) == []


@needs_simulator
def test_a_wrong_expectation_is_a_mismatch() -> None:
    right = simulated_circuits.case("add", 4, N=8)
    (port, values), *_ = right.outputs.items()
    wrong = Case(right.circuit, right.inputs, {port: values ^ 1})
    found = simulate(wrong)
    assert [one.vector for one in found] == [0, 1, 2, 3]
    assert "instead of" in str(found[0])


@needs_simulator
def test_half_precision_by_hand() -> None:
    def product(a: int, b: int) -> str:
        one = simulated_circuits.case("fp16_mul", 1)
        ports = [Port("a", 16), Port("b", 16)]
        inputs = {port: one.inputs[port] * 0 + value for port, value in zip(ports, (a, b), strict=True)}
        wrong = Case(circuit("fp16_mul"), inputs, {Port("y", 16): one.inputs[ports[0]] * 0 + 0xFFFF})
        return simulate(wrong)[0].found

    assert product(0x3E00, 0x4000) == "4200"  # 1.5 · 2 = 3
    assert product(0x7BFF, 0x4000) == "7c00"  # the largest one doubled is infinite
    assert product(0x0400, 0x3800) == "0000"  # half of the least normal number is none
    assert product(0x8001, 0x7BFF) == "8000"  # a subnormal number is zero of its sign
    assert product(0x7C00, 0x0001) == "7e00"  # and infinity times it is NaN


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown circuit 'mull'.*'mul'"):
        simulated_circuits.case("mull")
    with pytest.raises(OptionError, match=r"unknown unit 'fp16_mull'"):
        unit_circuit("fp16_mull")


def test_absent_programs_are_named_with_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProgramMissing, match=r"'yosys'.*apt-get install yosys"):
        synthesis.program("yosys", "yosys")
    monkeypatch.setenv("MIXQ_LIBERTY", str(tmp_path / "none.lib"))
    with pytest.raises(ProgramMissing, match=r"none\.lib.*apt-get install qflow-tech-osu018"):
        library_path()


def test_the_table_holds_the_fitted_widths_and_no_others() -> None:
    units = json.loads(TABLE.read_text())["units"]
    assert set(units) == set(CIRCUITS)
    for name, rows in units.items():
        widths = [{key: row[key] for key in row if key not in ("nand2", "lut6")} for row in rows]
        assert widths == FITTED[name]
        for held_out in HELD_OUT.get(name, []):
            assert held_out not in widths
            if name == "mul":
                assert {"n": held_out["m"], "m": held_out["n"]} not in widths


def test_the_table_is_written_as_it_is_read() -> None:
    assert dumped(json.loads(TABLE.read_text())) == TABLE.read_text()


def test_every_source_says_what_it_computes() -> None:
    for path in sources():
        assert path.read_text().startswith("// "), path.name


def test_rows_know_whether_they_hold() -> None:
    row = Row("dot", "fixed_dot", {"lanes": 8}, "nand2", 120.0, 100.0, False)
    assert row.error == pytest.approx(0.2)
    assert row.bound == BOUNDS["dot"]
    assert not row.holds
    assert "beyond 15%" in as_text([row])


@needs_synthesis
def test_area_grows_with_width_and_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXQ_CACHE_DIR", str(tmp_path))
    chains = [
        [circuit("add", N=n) for n in (4, 8, 16)],
        [circuit("mul", N=n, M=4) for n in (2, 4, 6)],
        [circuit("register", N=n) for n in (2, 4)],
        [circuit("fixed_dot", LANES=lanes, N=3, M=3, GROWTH=2) for lanes in (2, 4)],
    ]
    results = synthesise([one for chain in chains for one in chain])
    by_circuit = {circuit(one.unit, **one.parameters): one for one in results}
    for chain in chains:
        areas = [by_circuit[one].nand2 for one in chain]
        assert areas == sorted(areas)
        assert areas[0] > 0
    assert by_circuit[circuit("register", N=4)].nand2 == pytest.approx(16.0)
    assert by_circuit[circuit("register", N=4)].lut6 == 0
    assert by_circuit[circuit("add", N=8)].lut6 == 8
    # A circuit is the sum of its modules, and its files lie in the cache.
    assert synthesise(chains[0]) == [by_circuit[one] for one in chains[0]]
    assert len(list(tmp_path.rglob("*.json"))) == len(results)
