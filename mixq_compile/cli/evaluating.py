"""What `mixq eval` does: full precision first, then each scheme on a model loaded anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.cli.models import LoadedModel, load_model
from mixq_compile.cli.output import step
from mixq_compile.cli.scheme_choice import SchemeChoice
from mixq_compile.cli.texts import batches, read_text, windows
from mixq_compile.errors import OptionError

if TYPE_CHECKING:
    from mixq_compile.calibration import CalibrationStats
    from mixq_compile.evaluation import PerplexityResult
    from mixq_compile.runtime.report_tables import Report

CALIBRATION_WINDOWS = 128
PROMPT_WORDS = 8


@dataclass(frozen=True)
class Evaluation:
    """One call of `mixq eval`."""

    source: str
    text: Path
    protocol: str
    limit: int | None
    window: int | None
    batch: int
    stats: Path | None
    calibrate_text: Path | None
    calibrates: bool
    choices: tuple[SchemeChoice, ...]
    explicit: bool
    """False where the user named no scheme, and the choice is the default."""
    force: bool
    lowering: str
    tokens: int
    """Tokens to generate."""
    prompt: str | None
    device: str
    dtype: str

    def run(self) -> dict[str, Any]:
        """Everything measured, as JSON-able data."""
        content = read_text(self.text)
        prompt = (self.prompt or " ".join(content.split()[:PROMPT_WORDS])) if self.tokens else None
        loaded = self._load()
        if loaded.quantized:
            if self.explicit:
                raise OptionError(
                    f"{self.source} is quantized already: leave out --scheme, or give the original model."
                )
            score, row = self._quantized(loaded, content, prompt)
            return self._result(loaded, score, [row], prompt)
        score, reference = self._full_precision(loaded, content, prompt)
        statistics, origin = self._statistics(loaded, content)
        facts = self._result(loaded, score, [reference], prompt)
        del loaded
        for choice in self.choices:
            facts["rows"].append(self._scheme(choice, statistics, origin, content, prompt, reference))
        return facts

    def _load(self) -> LoadedModel:
        with step(f"loading {self.source}"):
            loaded = load_model(self.source, self.device, self.dtype)
        loaded.require_language_model()
        loaded.required_tokenizer()
        return loaded

    def _result(
        self, loaded: LoadedModel, score: PerplexityResult, rows: list[dict[str, Any]], prompt: str | None
    ) -> dict[str, Any]:
        return {
            "model": self.source,
            "device": str(loaded.device),
            "dtype": loaded.dtype,
            "protocol": score.protocol,
            "window": score.window,
            "limit": self.limit,
            "tokens_scored": score.tokens_scored,
            "documents": score.documents,
            "text": str(self.text),
            "text_sha256": score.text_sha256,
            "prompt": prompt,
            "rows": rows,
        }

    def _perplexity(self, model: Any, loaded: LoadedModel, content: str) -> PerplexityResult:
        from mixq_compile.evaluation import perplexity

        return perplexity(
            model, loaded.tokenizer, content, self.protocol, self.limit, self.window, batch_size=self.batch
        )

    def _compile(self, loaded: LoadedModel, options: Mapping[str, Any]) -> Any:
        import torch

        torch.compiler.reset()
        # Stories differ in length: one graph for all of them. Windows of the other protocols do not.
        return torch.compile(
            loaded.model,
            backend="mixq",
            options=dict(options),
            dynamic=True if self.protocol == "stories" else None,
        )

    def _full_precision(
        self, loaded: LoadedModel, content: str, prompt: str | None
    ) -> tuple[PerplexityResult, dict[str, Any]]:
        begin = time.perf_counter()
        with step(f"full precision ({loaded.dtype})", spinner=False):
            score = self._perplexity(loaded.model, loaded, content)
            written = self._continuation(loaded, prompt, None)
        row = _row(loaded.dtype, "none", score, None, None, time.perf_counter() - begin)
        return score, {**row, "generated": written}

    def _quantized(
        self, loaded: LoadedModel, content: str, prompt: str | None
    ) -> tuple[PerplexityResult, dict[str, Any]]:
        """A directory that `mixq quantize` wrote, under the backend."""
        from mixq_compile.runtime.report import report as report_on

        begin = time.perf_counter()
        options = {"lowering": self.lowering}
        with step("quantized", spinner=False):
            score = self._perplexity(self._compile(loaded, options), loaded, content)
            written = self._continuation(loaded, prompt, options)
        report = report_on(loaded.model)
        schemes = ", ".join(sorted({linear.scheme or "" for linear in report.quantized}))
        row = _row(schemes, schemes, score, None, report, time.perf_counter() - begin)
        return score, {**row, "generated": written}

    def _scheme(
        self,
        choice: SchemeChoice,
        statistics: CalibrationStats | None,
        origin: str,
        content: str,
        prompt: str | None,
        reference: dict[str, Any],
    ) -> dict[str, Any]:
        from mixq_compile.runtime.report import report as report_on

        loaded = self._load()
        options = {**choice.options, "force": self.force, "lowering": self.lowering}
        # Statistics that the user gave hold for every scheme; those made here only where they are needed.
        given = self.stats is not None or self.calibrate_text is not None
        calibrated = statistics is not None and (
            choice.takes_statistics if given else choice.wants_statistics
        )
        if calibrated:
            options["stats"] = statistics
        begin = time.perf_counter()
        with step(choice.label, spinner=False):
            fast = self._compile(loaded, options)
            score = self._perplexity(fast, loaded, content)
            report = report_on(fast)
            written = self._continuation(loaded, prompt, options)
        row = _row(
            choice.label, choice.options["scheme"], score, reference, report, time.perf_counter() - begin
        )
        row["notes"] = [*([f"calibrated on {origin}"] if calibrated else []), *self._notes(report)]
        row["generated"] = written
        if written is not None:
            row["agreement"] = _agreement(reference["generated"], written, loaded)
        return row

    def _notes(self, report: Report) -> list[str]:
        notes = []
        if not report.quantized:
            reasons = sorted({linear.skip or "" for linear in report.linears})
            advice = "" if self.force else " --force quantizes them all the same."
            notes.append(f"no linear was quantized: {'; '.join(reasons)}.{advice}")
        crowded = [linear.fqn for linear in report.quantized if linear.overflow]
        if crowded:
            notes.append(
                f"more outlier columns than slots in {len(crowded)} linears, such as {crowded[0]}: "
                "a larger --capacity or --threshold changes that"
            )
        return notes

    def _continuation(
        self, loaded: LoadedModel, prompt: str | None, options: Mapping[str, Any] | None
    ) -> str | None:
        """Greedy text through `generate` with a static cache, the decoding steps compiled by the backend."""
        if prompt is None:
            return None
        from transformers import CompileConfig

        from mixq_compile.evaluation import generate_text

        settings: dict[str, Any] = {"cache_implementation": "static"}
        if options is None:
            settings["disable_compile"] = True
        else:
            # transformers passes its own mode to the backend; torch takes a mode or options, not both.
            mode = "reduce-overhead" if loaded.device.type == "cuda" else None
            config = CompileConfig(backend="mixq", mode=None, options={**options, "mode": mode})  # type: ignore[arg-type]
            # Without this generate() compiles on accelerators only.
            config._compile_all_devices = True  # type: ignore[assignment]
            settings["compile_config"] = config
        return generate_text(loaded.model, loaded.tokenizer, prompt, self.tokens, **settings)

    def _statistics(self, loaded: LoadedModel, content: str) -> tuple[CalibrationStats | None, str]:
        """Statistics and their origin: a file, a text, or what the limit leaves of the scored text."""
        from mixq_compile.calibration import CalibrationStats, calibrate

        if self.stats is not None:
            return CalibrationStats.load(self.stats), str(self.stats)
        ids, origin = self._calibration_windows(loaded, content)
        if not ids:
            return None, ""
        with step(f"calibrating on {origin}", spinner=False):
            return calibrate(loaded.model, batches(ids, self.batch)), origin

    def _calibration_windows(self, loaded: LoadedModel, content: str) -> tuple[list[list[int]], str]:
        from mixq_compile.evaluation.protocols import get_protocol
        from mixq_compile.evaluation.scoring import context_length

        wanted = any(choice.wants_statistics for choice in self.choices)
        protocol = get_protocol(self.protocol)
        sizes = (self.window, protocol.default_window, context_length(loaded.model))
        length = min(size for size in sizes if size is not None)
        if self.calibrate_text is not None:
            ids = windows(loaded.tokenizer, read_text(self.calibrate_text), length, CALIBRATION_WINDOWS)
            return ids, f"{len(ids)} windows of {self.calibrate_text}"
        if not wanted or not self.calibrates or self.limit is None:
            return [], ""
        rest = protocol.windows(loaded.tokenizer, content, length, None)[self.limit :]
        ids = [list(part.tokens) for part in rest[-CALIBRATION_WINDOWS:]]
        return ids, f"the last {len(ids)} windows of the text, which are not scored"


def _agreement(wanted: str, got: str, loaded: LoadedModel) -> dict[str, int]:
    from mixq_compile.evaluation import compare_generation

    found = compare_generation(wanted, got, loaded.tokenizer)
    return {
        "equal_tokens": found.equal_tokens,
        "reference_tokens": found.reference_tokens,
        "tokens": found.tokens,
    }


def _row(
    label: str,
    scheme: str,
    score: PerplexityResult,
    reference: dict[str, Any] | None,
    report: Report | None,
    seconds: float,
) -> dict[str, Any]:
    shares = {
        linear.fqn: len(linear.outlier_columns) / linear.in_features
        for linear in (report.quantized if report else ())
    }
    return {
        "label": label,
        "scheme": scheme,
        "perplexity": score.perplexity,
        "delta": None if reference is None else score.perplexity - reference["perplexity"],
        "linears": None if report is None else len(report.linears),
        "quantized": 0 if report is None else len(report.quantized),
        "outlier_share": {"mean": sum(shares.values()) / len(shares), "max": max(shares.values())}
        if shares
        else None,
        "outlier_share_of": shares,
        "seconds": seconds,
        "notes": [],
        "generated": None,
        "agreement": None,
    }
