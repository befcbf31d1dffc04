import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import mixq

from mixq_compile.benchmarking import choices, results
from mixq_compile.benchmarking.environment import Environment
from mixq_compile.benchmarking.results import Document, Plot, Table, summarise_missing
from mixq_compile.benchmarking.shapes import MODELS, find_model, parse_shape
from mixq_compile.benchmarking.timing import Call, PeerMissing, Timing, measure
from mixq_compile.cli.bench import BENCHMARKS
from mixq_compile.errors import OptionError


@dataclass(frozen=True)
class Options:
    rows: tuple[int, ...] = (1, 2)


def document() -> Document:
    environment = Environment(
        device="a device", threads=None, mixq_compile="0", torch="2", cuda=None, python="3", packages={},
        commit="0123456789abcdef", copy_gigabytes_per_second=4000.0, launch_us=3.5,
        clocks={"processor_mhz": 1980.0},
    )  # fmt: skip
    return Document(
        benchmark="some",
        environment=environment,
        options=Options(),
        cases=(Options((3,)),),
        summary={"mean": 1.5, "of nothing": float("inf")},
        missing={"fp8": "no such device"},
        tables=(Table("A table", ("a", "b"), (("x|y", "1"),)),),
        plots=(Plot("a plot", "µs", ("one", "two"), {"first": (1.0, None), "second": (2.0, 3.0)}, 1.0),),
    )


def test_markdown_names_device_commit_clocks_and_what_is_missing() -> None:
    shown = document().markdown()
    assert "a device; torch 2; mixq-compile 0; commit 0123456789ab; copy 4000 GB/s" in shown
    assert "under load: processor_mhz 1980" in shown
    assert "| x\\|y | 1 |" in shown
    assert "- fp8: no such device" in shown


def test_files_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written, note = document().write(tmp_path / "new")
    assert [path.name for path in written] == ["some.json", "some.md"]
    assert "pip install 'mixq-compile[bench]'" in note
    found = json.loads(written[0].read_text())
    assert found["cases"] == [{"rows": [3]}]
    assert found["summary"]["of nothing"] == "inf"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written, note = document().write(tmp_path)
    assert note == ""
    assert written[2].name == "some-1.png"
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_reasons_are_counted() -> None:
    cases = [{"a": "no"}, {"a": "no", "b": "never"}, {"a": "not now"}]
    assert summarise_missing(cases) == {
        "a": "no (2 of 3 cases); not now (1 of 3 cases)",
        "b": "never (1 of 3 cases)",
    }


def test_an_optional_call_that_fails_is_a_reason_and_another_one_an_error() -> None:
    import torch

    def fail() -> None:
        raise PeerMissing("cannot run here")

    cpu = torch.device("cpu")
    timings, missing = measure({"good": Call(lambda: 1), "bad": Call(fail, optional=True)}, cpu, 3)
    assert list(timings) == ["good"]
    assert missing == {"bad": "cannot run here"}
    with pytest.raises(PeerMissing):
        measure({"bad": Call(fail)}, cpu, 3)


def test_what_a_run_changes_is_prepared_before_each() -> None:
    import torch

    order: list[str] = []
    call = Call(lambda: order.append("run"), prepare=lambda: order.append("prepare"))
    measure({"a": call}, torch.device("cpu"), 2)
    assert order == ["prepare", "run"] * (len(order) // 2)


def test_percentiles() -> None:
    timing = Timing.of([float(value) for value in range(101)], graphed=False)
    assert (timing.p10_us, timing.median_us, timing.p90_us) == pytest.approx((10.0, 50.0, 90.0))


def test_projections_of_models() -> None:
    shapes = {shape.name: str(shape) for shape in find_model("llama-3-8b").projections()}
    assert shapes["k_proj"] == "1024×4096"
    assert shapes["down_proj"] == "4096×14336"
    assert {str(shape) for shape in MODELS["llama-2-7b"].projections()} == {
        "4096×4096", "11008×4096", "4096×11008",
    }  # fmt: skip
    with pytest.raises(OptionError, match="Did you mean 'llama-2-7b'"):
        find_model("llama2-7b")


def test_shapes_are_read_in_two_spellings() -> None:
    assert parse_shape("11008,4096") == parse_shape("11008x4096")
    assert parse_shape("11008,4096").name == "7B up"
    assert parse_shape("8,16").name == ""


def test_every_peer_has_a_builder() -> None:
    from mixq_compile.benchmarking import baselines

    assert set(baselines._BUILDERS) == set(choices.PEERS)
    assert set(choices.LABELS) == set(choices.PEERS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_teaches(name: str) -> None:
    shown = " ".join(mixq("bench", name, "--help").stdout.split())
    assert f"Example: mixq bench {name}" in shown
    assert "--json" in shown


def test_help_lists_every_benchmark() -> None:
    shown = mixq("bench", "--help").stdout
    assert all(name in shown for name in BENCHMARKS)


def test_help_loads_nothing_heavy() -> None:
    source = (
        "import sys; from mixq_compile.cli.app import app\n"
        "assert not {'torch', 'triton', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numbers_that_are_missing_are_dashes() -> None:
    assert results.number(None) == "–"
    assert results.number(1.234) == "1.23"
