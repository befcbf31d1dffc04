"""What `mixq eval` does: full precision and each scheme, on models loaded anew, window by window."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.cli.evaluation_rows import beside_plain, linear_notes, row_of
from mixq_compile.cli.models import LoadedModel, load_model
from mixq_compile.cli.output import shown, step, write_json
from mixq_compile.cli.scheme_choice import SchemeChoice
from mixq_compile.cli.texts import batches, read_text, windows
from mixq_compile.errors import OptionError
from mixq_compile.ir.free_memory import free_bytes

if TYPE_CHECKING:
    from mixq_compile.calibration import CalibrationStats
    from mixq_compile.evaluation import WindowScore
    from mixq_compile.evaluation.protocols import Window
    from mixq_compile.runtime.report_tables import Report

MOST_TOGETHER = 4
"""Schemes at once: torch compiles one function for at most eight callers."""
RESERVE = 0.2
"""Part of the free memory that models must leave, for activations and logits."""
CALIBRATION_WINDOWS = 32
PROMPT_WORDS = 8


@dataclass(frozen=True)
class _Run:
    """A scheme under way, on a model of its own."""

    choice: SchemeChoice
    loaded: LoadedModel
    fast: Any
    """The compiled model."""
    options: Mapping[str, Any]
    calibrated: bool

    @property
    def report(self) -> Report:
        """What became of each linear, and the outlier columns known now."""
        from mixq_compile.runtime.report import report as report_on

        return report_on(self.fast)


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
    output: Path | None
    """Where the figures found so far are written after each batch of windows."""

    def run(self) -> dict[str, Any]:
        """Everything measured, as JSON-able data; written to `output` as it is found."""
        content = read_text(self.text)
        self._check_calibration_text(content)
        prompt = (self.prompt or " ".join(content.split()[:PROMPT_WORDS])) if self.tokens else None
        loaded = self._load()
        if loaded.quantized:
            if self.explicit:
                raise OptionError(
                    f"{self.source} is quantized already: leave out --scheme, or give the original model."
                )
            return self._kept(self._quantized(loaded, content, prompt))
        return self._compared(loaded, content, prompt)

    def _check_calibration_text(self, content: str) -> None:
        """Raises OptionError where the scored text would choose the outlier columns too."""
        if self.calibrate_text is not None and read_text(self.calibrate_text) == content:
            raise OptionError(
                f"--calibrate-text {self.calibrate_text} is the text that is scored: a model calibrated on "
                "it looks better than it is. Give another text."
            )

    def _kept(self, result: dict[str, Any]) -> dict[str, Any]:
        if self.output is not None:
            write_json(self.output, result)
        return result

    def _compared(self, loaded: LoadedModel, content: str, prompt: str | None) -> dict[str, Any]:
        """Full precision and every scheme, window by window: as many together as memory holds."""
        from mixq_compile.evaluation import perplexity_windows
        from mixq_compile.evaluation.divergence import REFERENCE, divergence

        windows, length = perplexity_windows(
            loaded.model, loaded.tokenizer, content, self.protocol, self.limit, self.window
        )
        statistics, origin = self._statistics(loaded, content)
        scored = sum(part.scored for part in windows)
        facts = self._facts(loaded, content, length, len(windows), scored, prompt)
        together = self._together(loaded)
        written = self._continuation(loaded, prompt, None)
        exact: list[WindowScore] = []
        if not together or not self.choices:
            exact = self._scored(loaded.model, [], windows, facts)[REFERENCE]
        if not together:
            loaded.model.to("meta")  # its memory is the next one's
        for start in range(0, len(self.choices), together or 1):
            runs = self._runs(self.choices[start : start + (together or 1)], statistics)
            found = self._scored(loaded.model if together else None, runs, windows, facts)
            exact = exact or found[REFERENCE]
            for run in runs:
                row = self._row_of(run, exact, found, is_compared=together > 0)
                row["notes"] += [f"calibrated on {origin}"] if run.calibrated else []
                row["notes"] += linear_notes(run.report, is_forced=self.force)
                row["generated"] = text = self._continuation(run.loaded, prompt, run.options)
                row["agreement"] = None if text is None else _agreement(written or "", text, run.loaded)
                facts["rows"].append(row)
            del runs, run
        first = row_of(loaded.dtype, "none", divergence(exact, exact), None, None)
        facts["rows"] = beside_plain([{**first, "generated": written}, *facts["rows"]])
        return self._kept({**facts, "complete": True})

    def _together(self, loaded: LoadedModel) -> int:
        """How many schemes' models fit beside the one in full precision; 0: not one."""
        model = sum(tensor.nbytes for tensor in loaded.model.parameters())
        free = free_bytes(loaded.device)
        if free is None:
            return MOST_TOGETHER
        # The backend keeps the 16-bit weights and its own.
        return min(MOST_TOGETHER, int(free * (1 - RESERVE) / (2 * model)))

    def _scored(
        self, reference: Any, runs: Sequence[_Run], windows: Sequence[Window], facts: Mapping[str, Any]
    ) -> dict[str, list[WindowScore]]:
        """The scores of each window by label; those of a single model where the reference has gone."""
        from mixq_compile.evaluation import scores
        from mixq_compile.evaluation.divergence import REFERENCE

        models = {run.choice.label: run.fast for run in runs}
        alone = reference is None
        if alone:
            ((label, reference),) = models.items()
            models = {}
        found: dict[str, list[WindowScore]] = defaultdict(list)
        labels = [label] if alone else ["full precision", *models]
        with step(", ".join(labels), spinner=False):
            for batch in shown(scores(reference, models, windows, batch_size=self.batch), len(windows)):
                for name, each in batch.items():
                    found[label if alone else name].extend(each)
                if self.output is not None and not alone and runs:
                    rows = [self._row_of(run, found[REFERENCE], found, is_compared=True) for run in runs]
                    self._kept({**facts, "rows": [*facts["rows"], *rows], "complete": False})
        return found

    def _row_of(
        self,
        run: _Run,
        exact: Sequence[WindowScore],
        found: Mapping[str, Sequence[WindowScore]],
        *,
        is_compared: bool,
    ) -> dict[str, Any]:
        from mixq_compile.evaluation.divergence import divergence

        label = run.choice.label
        result = divergence(exact, found[label])
        row = row_of(label, run.choice.options["scheme"], result, divergence(exact, exact), run.report)
        if not is_compared:
            row |= dict.fromkeys(("kl", "top1", "sqnr_db"))
            row["notes"].append("KL and agreement need both models in memory, which holds one")
        return row

    def _runs(self, choices: Sequence[SchemeChoice], statistics: CalibrationStats | None) -> list[_Run]:
        """A model loaded anew and compiled for each scheme."""
        import torch

        torch.compiler.reset()
        # Statistics that the user gave hold for every scheme; those made here only where they are needed.
        given = self.stats is not None or self.calibrate_text is not None
        runs = []
        for choice in choices:
            calibrated = statistics is not None and (
                choice.takes_statistics if given else choice.wants_statistics
            )
            options = {**choice.options, "force": self.force, "lowering": self.lowering}
            options |= {"stats": statistics} if calibrated else {}
            loaded = self._load()
            runs.append(_Run(choice, loaded, self._compile(loaded, options), options, calibrated))
        return runs

    def _load(self) -> LoadedModel:
        with step(f"loading {self.source}"):
            loaded = load_model(self.source, self.device, self.dtype)
        loaded.require_language_model()
        loaded.required_tokenizer()
        return loaded

    def _facts(
        self, loaded: LoadedModel, content: str, window: int, documents: int, scored: int, prompt: str | None
    ) -> dict[str, Any]:
        return {
            "model": self.source,
            "device": str(loaded.device),
            "dtype": loaded.dtype,
            "protocol": self.protocol,
            "window": window,
            "limit": self.limit,
            "tokens_scored": scored,
            "documents": documents,
            "text": str(self.text),
            "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "prompt": prompt,
            "rows": [],
        }

    def _compile(self, loaded: LoadedModel, options: Mapping[str, Any]) -> Any:
        import torch

        # Stories differ in length: one graph for all of them. Windows of the other protocols do not.
        return torch.compile(
            loaded.model,
            backend="mixq",
            options=dict(options),
            dynamic=True if self.protocol == "stories" else None,
        )

    def _quantized(self, loaded: LoadedModel, content: str, prompt: str | None) -> dict[str, Any]:
        """A directory that `mixq quantize` wrote, under the backend: there is no reference beside it."""
        from mixq_compile.evaluation import divergence, perplexity_windows, scores
        from mixq_compile.evaluation.divergence import REFERENCE
        from mixq_compile.runtime.report import report as report_on

        options = {"lowering": self.lowering}
        windows, length = perplexity_windows(
            loaded.model, loaded.tokenizer, content, self.protocol, self.limit, self.window
        )
        with step("quantized", spinner=False):
            fast = self._compile(loaded, options)
            found = [
                score
                for batch in shown(scores(fast, {}, windows, batch_size=self.batch), len(windows))
                for score in batch[REFERENCE]
            ]
            written = self._continuation(loaded, prompt, options)
        report = report_on(loaded.model)
        schemes = ", ".join(sorted({linear.scheme or "" for linear in report.quantized}))
        row = {**row_of(schemes, schemes, divergence(found, found), None, report), "generated": written}
        facts = self._facts(loaded, content, length, len(windows), sum(w.scored for w in windows), prompt)
        return {**facts, "rows": [row], "complete": True}

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
            return calibrate(loaded.model, batches(ids, self.batch), kinds=self._kinds()), origin

    def _kinds(self) -> tuple[str, ...]:
        """The kinds of statistics that any of the schemes takes."""
        return tuple({kind: None for choice in self.choices for kind in choice.kinds})

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
