"""Makes the tables of README.md and docs/models.md from benchmarks/results; run after measuring.

`python benchmarks/readme_tables.py` writes them; with `--check` it fails where one is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import area_tables
from area_tables import markdown as _markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return loaded


def demo() -> str:
    """all-MiniLM-L6-v2 on a CPU."""
    found = _load("demo_cpu")
    where = found["environment"]
    rows = [
        [
            row["label"], f"{row['milliseconds']:.0f} ms", f"{row['speedup_over_eager']:.2f}×",
            f"{row['speedup_over_inductor']:.2f}×", f"{row['linear_bytes'] / 2**20:.1f} MiB",
            f"{row['relative_error']:.4f}", f"{row['cosine']:.4f}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    title = (
        f"**An encoder on a CPU.** all-MiniLM-L6-v2, {found['batch']} × {found['length']} tokens, on "
        f"{where['threads']} threads of an {where['processor']}, medians of interleaved calls "
        "(`mixq demo`):"
    )
    header = ["", "time", "over eager", "over Inductor", "linears", "relative error", "cosine"]
    return f"{title}\n\n{_markdown(header, rows)}"


SHOWN_ROWS = (1, 16, 64, 256, 1024, 4096)
SHOWN_LINEARS = ("7B up", "7B down", "7B o", "70B up")
WHOLE = "mixq whole"
FP8 = "fp8-dynamic"


def _median(case: dict[str, Any], name: str) -> float:
    return float(case["timings"][name]["median_us"])


def _where(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return f"{environment['device']}, torch {environment['torch']}"


def linear() -> str:
    """Linears on an H200, everything included."""
    found = _load("kernels_h200")
    rows = [
        [
            f"{case['out_features']} × {case['in_features']}", str(case["rows"]),
            f"{_median(case, 'bf16'):.0f} µs", f"{_median(case, FP8):.0f} µs",
            f"{_median(case, WHOLE):.0f} µs",
            f"{_median(case, 'bf16') / _median(case, WHOLE):.2f}×",
            f"{_median(case, FP8) / _median(case, WHOLE):.2f}×",
            f"{case['errors'][FP8]:.4f}", f"{case['errors']['mixq, originals']:.4f}",
        ]
        for case in found["cases"]
        if case["rows"] in SHOWN_ROWS and case["name"] in SHOWN_LINEARS
    ]  # fmt: skip
    title = (
        f"**One linear on a GPU.** `w8a8o16` on an {_where(found)}, beside bf16 (cuBLAS) and fp8 with one "
        "scale for each row (`_scaled_mm`, its quantization compiled by Inductor). Everything in CUDA "
        "graphs, L2 flushed; ours with quantization, the check for new outlier columns, and all 128 outlier "
        "slots in use (`mixq bench kernels`). Errors are against float64; that of bf16 is 0.0017:"
    )
    header = [
        "N × K", "M", "bf16", "fp8", "mixq", "over bf16", "over fp8", "error fp8", "error mixq",
    ]  # fmt: skip
    return f"{title}\n\n{_markdown(header, rows)}"


def model() -> str:
    """Layers of Llama-2-7B on an H200."""
    names = ("model_contexts_h200", "model_decode_h200", "model_decode_int4_h200", "model_prefill_h200")
    contexts, decode, decode_int4, prefill = map(_load, names)
    rows = [
        [
            case["workload"], scheme, f"{_median(case, 'bf16') / 1000:.2f} ms",
            f"{_median(case, scheme) / 1000:.2f} ms", f"{case['speedup'][scheme]:.2f}×",
            f"{case['first_call_seconds']['bf16']:.0f} s", f"{case['first_call_seconds'][scheme]:.0f} s",
        ]
        for found in (contexts, decode, decode_int4, prefill)
        for case in found["cases"]
        for scheme in case["speedup"]
    ]  # fmt: skip
    memory = {entry["scheme"]: entry["ratio"] for entry in prefill["memory"]}
    ratios = ", ".join(f"{ratio:.2f} with `{scheme}`" for scheme, ratio in memory.items())
    title = (
        f"**A model on a GPU.** {prefill['options']['layers']} layers of Llama-2-7B (random weights, planted "
        f"outliers), {_where(prefill)}, both sides compiled by Inductor and run as CUDA graphs "
        "(`mixq bench model`; threshold 6). Memory of the quantized linears over that of their 16-bit "
        f"weights: {ratios}:"
    )
    header = ["workload", "scheme", "bf16", "mixq", "speed-up", "first call bf16", "first call mixq"]
    return f"{title}\n\n{_markdown(header, rows)}"


def peers() -> str:
    """Linears beside other packages' quantized ones."""
    found = _load("kernels_peers_h200")
    names = ("bf16", "torchao-int8", "torchao-fp8", "llm-int8", WHOLE)
    rows = [
        [
            f"{case['out_features']} × {case['in_features']}", str(case["rows"]),
            *(f"{_median(case, name):.0f} µs" if name in case["timings"] else "–" for name in names),
        ]
        for case in found["cases"]
    ]  # fmt: skip
    packages = found["environment"]["packages"]
    title = (
        f"One linear beside those of torchao {packages['torchao']} (dynamic quantization, compiled) and "
        f"bitsandbytes {packages['bitsandbytes']} (LLM.int8(), threshold 6, fp16), {_where(found)} "
        "(`mixq bench kernels --only whole --peers torchao-int8,torchao-fp8,llm-int8`). torchao's int8 "
        "product takes no fewer than 17 rows, and LLM.int8() waits for the device, so that its launches are "
        "in its time:"
    )
    header = ["N × K", "M", "bf16", "torchao int8", "torchao fp8", "LLM.int8()", "mixq"]
    return f"{title}\n\n{_markdown(header, rows)}"


def breakdown() -> str:
    """What each fusion gains, and what new outlier columns cost."""
    found = _load("breakdown_h200")
    stages = list(found["cases"][0]["stage_speedup"])
    fused = [
        [
            f"{case['out_features']} × {case['in_features']}", str(case["rows"]),
            f"{_median(case, 'bf16'):.0f} µs", *(f"{_median(case, stage):.0f} µs" for stage in stages),
        ]
        for case in found["cases"]
    ]  # fmt: skip
    percents = [miss["percent"] for miss in found["cases"][0]["misses"]]
    missed = [
        [
            f"{case['out_features']} × {case['in_features']}", str(case["rows"]),
            f"{case['policy_overhead']['exact']:+.1%}", _spread(case["timings"]),
            *(f"{miss['mean_us']:.0f} µs" for miss in case["misses"]),
        ]
        for case in found["cases"]
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"One linear with 128 outlier columns, {_where(found)} (`mixq bench breakdown`):",
            _markdown(["N × K", "M", "bf16", *stages], fused),
            "What the exact policy costs over `static` where no call misses, and the mean time of a call "
            "where so many percent of them meet a new outlier column. The spread is from the fastest tenth "
            "of one against the slowest tenth of the other to the reverse: where it holds zero, nothing was "
            "measured but noise, and a negative cost is none that is saved:",
            _markdown(["N × K", "M", "exact", "spread", *(f"{percent} %" for percent in percents)], missed),
        ]
    )


def _spread(timings: dict[str, Any]) -> str:
    """The least and the most that exact may cost over static, by the tenths of both."""
    exact, static = timings["exact"], timings["static"]
    low, high = exact["p10_us"] / static["p90_us"] - 1, exact["p90_us"] / static["p10_us"] - 1
    return f"{low:+.1%} to {high:+.1%}"


def structure() -> str:
    """Outlier columns in their places against moved out."""
    found = _load("structure_h200")
    names = (
        "order-reserved: whole", "permuted: whole", "order-reserved, one new column",
        "permuted, one column moved", "permuted, all columns again",
    )  # fmt: skip
    rows = [
        [
            f"{case['out_features']} × {case['in_features']}", str(case["rows"]),
            *(f"{_median(case, name):.0f} µs" for name in names),
        ]
        for case in found["cases"]
    ]  # fmt: skip
    title = (
        f"Outlier columns in their places against moved out of the matrices, {_where(found)} "
        "(`mixq bench structure`):"
    )
    return f"{title}\n\n{_markdown(['N × K', 'M', *names], rows)}"


def host() -> str:
    """What a user runs first: no options, no CUDA graphs."""
    found = _load("host_h100")
    names = {"compiled": "compiled", "compiled, CUDA graphs": 'compiled, `"mode": "reduce-overhead"`'}
    names["eager"] = "swapped by `quantize`, not compiled"
    rows = [
        [
            f"{case['sequences']} × {case['tokens']}", names[case["way"]],
            f"{case['ordinary']['device_us'] / 1000:.2f} ms", f"{case['mixq']['device_us'] / 1000:.2f} ms",
            f"{case['speedup']:.2f}×",
            f"{case['ordinary']['host_us'] / 1000:.2f} ms", f"{case['mixq']['host_us'] / 1000:.2f} ms",
        ]
        for case in found["cases"]
    ]  # fmt: skip
    title = (
        f"**As a user runs it.** {found['options']['layers']} layers of Llama-3-8B by configuration on an "
        f"{found['environment']['device']}, torch {found['environment']['torch']}: "
        '`torch.compile(model, backend="mixq")` with no options beside `torch.compile(model)`, whole calls '
        "and the host's time to issue one (`mixq bench host`; threshold 6). Where a call waits for the host, "
        "CUDA graphs gain more:"
    )
    header = ["tokens", "", "bf16", "mixq", "over bf16", "host: bf16", "host: mixq"]
    return f"{title}\n\n{_markdown(header, rows)}"


def perplexity() -> str:
    """A trained language model on text that calibration has not seen."""
    found = _load("perplexity_stories")

    def cells(row: dict[str, Any]) -> list[str]:
        share = row["outlier_share"]
        return [
            row["label"], f"{row['perplexity']:.3f}",
            "–" if row["delta"] is None else f"{row['delta']:+.3f}",
            "–" if share is None else f"{share['mean']:.1%}, {share['max']:.1%}",
        ]  # fmt: skip

    title = (
        f"**A language model.** {found['model']}, a Llama trained on short stories, over "
        f"{found['documents']} stories ({found['tokens_scored']} tokens), every linear but the head "
        "quantized; the 4-bit schemes are calibrated on other stories "
        "(`mixq eval --protocol stories --force`):"
    )
    header = ["", "perplexity", "over full precision", "columns in full precision: mean, most"]
    return f"{title}\n\n{_markdown(header, [cells(row) for row in found['rows']])}"


def language_model() -> str:
    """A real language model on text that calibration has not seen, its linears all quantized."""
    found, calibrated = _load("perplexity_gemma"), _load("perplexity_gemma_calibrated")
    shared = ("text_sha256", "documents", "window", "protocol")
    assert all(found[name] == calibrated[name] for name in shared), "two runs over the same tokens"

    def cells(row: dict[str, Any]) -> list[str]:
        share, error = row["outlier_share"], row["delta_share_error"]
        if row["linears"] is None:
            return [row["label"], f"{row['perplexity']:.2f}", *["–"] * 5]
        change = f"{100 * row['delta_share']:+.2f} ± {100 * error:.2f} %"
        return [
            row["label"], f"{row['perplexity']:.2f}", change, f"{row['kl']:.4f}",
            f"{100 * row['top1']:.1f} %", f"{100 * share['mean']:.1f} %" if share["max"] else "–",
            f"{row['bits_per_weight']:.2f}",
        ]  # fmt: skip

    rows = [*found["rows"], *(row for row in calibrated["rows"] if row["label"] in ("w8a16", "auto8"))]
    quantized = max(row["quantized"] for row in rows)
    title = (
        f"**A real language model.** Gemma 3 270M on {found['documents']} windows of {found['window']} "
        f"tokens of WikiText-2's test set ({found['tokens_scored']} tokens scored), all {quantized} linears "
        "but the head quantized, on a CPU; `auto8` is calibrated on the validation set, others are not "
        "(`mixq eval --protocol windows --force`). KL is the divergence of a token's distribution from full "
        "precision's, top-1 how often both think the same token most likely:"
    )
    header = ["", "perplexity", "change", "KL", "top-1", "16-bit columns", "bits a weight"]
    return f"{title}\n\n{_markdown(header, [cells(row) for row in rows])}"


ENCODERS = {"encoder_minilm": "all-MiniLM-L6-v2"}


def encoders() -> str:
    """Real encoders by scheme, beside another runtime's int8."""
    found = {name: _load(name) for name in ENCODERS}
    first = next(iter(found.values()))
    rows = [
        [
            f"{ENCODERS[name]}, {each['batch']} × {each['window']}", row["label"],
            f"{1000 * row['seconds']:.0f} ms", f"{row['speedup']:.2f}×", f"{row['relative_error']:.4f}",
            f"{row['cosine']:.4f}",
        ]
        for name, each in found.items()
        for row in each["rows"]
    ]  # fmt: skip
    where = first["environment"]
    title = (
        f"**An encoder beside ONNX Runtime.** Lines of WikiText-2's test set, on {where['threads']} threads "
        f"of an {where['processor']}; rounds in turn, all linears quantized, `auto8` calibrated on the "
        f"validation set, ONNX Runtime {where['onnxruntime']} with its dynamic int8 "
        "(`python -m benchmarks.encoders`). Errors are of the tokens' vectors; `w8a16`, which rounds the "
        "weights alone, has no fast kernel on a CPU:"
    )
    header = ["model", "", "time", "over Inductor", "error", "cosine of embeddings"]
    return f"{title}\n\n{_markdown(header, rows)}"


def architectures() -> str:
    """What the tests run."""
    found, routes = _load("architectures"), ("backend", "quantize", "export")
    rows = [
        [
            row["architecture"], str(row["found"]), str(row["quantized"]), row["skipped"] or "–",
            *(f"{row['sqnr'][route]:.1f}" if route in row["sqnr"] else "–" for route in routes),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    header = ["architecture", "linears", "quantized", "left alone", *routes]
    missing: dict[str, list[str]] = {}
    for row in found["rows"]:
        for route, reason in row["without"].items():
            missing.setdefault(f"not by the {route} route: {reason}", []).append(row["architecture"])
    notes = [f"{', '.join(names)} {reason}." for reason, names in missing.items()]
    return "\n\n".join([_markdown(header, rows), *notes])


def checkpoint_architectures() -> str:
    """What quantizing directories of tiny configurations gives."""
    rows = [
        [
            row["architecture"], str(row["by_module"]), str(row["by_file"]),
            "; ".join(f"{count} × {reason}" for reason, count in row["left_alone"].items()) or "–",
            f"{row['sqnr']:.1f}", row["differs"] or "equal bits", f"{row['generated']} tokens",
        ]
        for row in _load("checkpoint_architectures")["rows"]
    ]  # fmt: skip
    header = ["architecture", "by module", "by file", "left alone", "SQNR", "routes", "generate"]
    return _markdown(header, rows)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "demo": ("README.md", demo),
    "linear": ("README.md", linear),
    "host": ("README.md", host),
    "model": ("README.md", model),
    "peers": ("docs/benchmarks.md", peers),
    "breakdown": ("docs/benchmarks.md", breakdown),
    "structure": ("docs/benchmarks.md", structure),
    "area-units": ("docs/area.md", area_tables.units),
    "area-comparison": ("docs/area.md", area_tables.comparison),
    "area-validation": ("docs/area.md", area_tables.validation),
    "perplexity": ("README.md", perplexity),
    "language-model": ("README.md", language_model),
    "encoders": ("README.md", encoders),
    "architectures": ("docs/models.md", architectures),
    "checkpoint-architectures": ("docs/checkpoints.md", checkpoint_architectures),
}


def main() -> int:
    """Writes or checks every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a table is out of date"
    )
    arguments = parser.parse_args()
    stale = []
    for name, (file, make) in TABLES.items():
        path = ROOT / file
        text = path.read_text()
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{file} has no place for the table {name!r}")
        made = make()
        updated = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
        if updated != text:
            stale.append(f"{name} in {file}")
            if not arguments.check:
                path.write_text(updated)
    if stale:
        print(("out of date: " if arguments.check else "written: ") + ", ".join(stale))
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
