"""What `mixq eval --protocol embeddings` does: an encoder in full precision and by schemes, on lines."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.cli.evaluation_rows import beside_plain, linear_figures, linear_notes
from mixq_compile.cli.models import LoadedModel, load_model
from mixq_compile.cli.output import step, write_json
from mixq_compile.cli.scheme_choice import SchemeChoice
from mixq_compile.cli.texts import encode, read_text
from mixq_compile.errors import MixqError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from mixq_compile.calibration import CalibrationStats
    from mixq_compile.evaluation.embeddings import Reference

ROUNDS = 5
DEFAULT_LENGTH = 128
DEFAULT_ROWS = 64
CALIBRATION_ROWS = 256
Inputs = Mapping[str, "Tensor"]


def text_rows(text: str, length: int) -> list[str]:
    """The lines of a text that have at least half as many words as a row may have tokens."""
    return [line.strip() for line in text.splitlines() if 2 * len(line.split()) >= length]


def encoder_of(loaded: LoadedModel) -> LoadedModel:
    """The encoder in a model that guesses masked words, as embedders are often published; others as such."""
    model = loaded.model
    if not type(model).__name__.endswith("ForMaskedLM"):
        return loaded
    return dataclasses.replace(loaded, model=model.base_model)


@dataclass
class _Run:
    """One way to run the model: full precision, or a scheme."""

    label: str
    call: Any
    choice: SchemeChoice | None = None
    calibrated: bool = False
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EncoderEvaluation:
    """One call of `mixq eval --protocol embeddings`."""

    source: str
    text: Path
    limit: int | None
    window: int | None
    batch: int
    stats: Path | None
    calibrate_text: Path | None
    choices: tuple[SchemeChoice, ...]
    force: bool
    lowering: str
    device: str
    dtype: str
    output: Path | None
    others: Mapping[str, Any] = field(default_factory=dict)
    """Further ways to run the model by label, called as it is: another runtime's, measured in turn."""

    def run(self) -> dict[str, Any]:
        """Everything measured, as JSON-able data; written to `output` too.

        Raises OptionError where the text has no rows, or would calibrate the model that it judges, and
        MixqError where the model is no encoder.
        """
        content = read_text(self.text)
        if self.calibrate_text is not None and read_text(self.calibrate_text) == content:
            raise OptionError(
                f"--calibrate-text {self.calibrate_text} is the text that is compared on: a model calibrated "
                "on it looks better than it is. Give another text."
            )
        with step(f"loading {self.source}"):
            loaded = encoder_of(load_model(self.source, self.device, self.dtype))
        length = self._length(loaded)
        batches = self._batches(loaded, content, length, self.limit or DEFAULT_ROWS, self.text)
        with step("full precision (float32)"):
            references = self._references(loaded, batches)
        calibrated = self._statistics(loaded, length)
        runs = self._runs(loaded, calibrated)
        rows = [self._row(run, batches, references) for run in runs]
        with step(f"timing {ROUNDS} rounds"):
            _time(runs, batches)
        for run, row in zip(runs, rows, strict=True):
            row["seconds"] = statistics.median(run.seconds)
            row["speedup"] = statistics.median(runs[0].seconds) / row["seconds"]
        result = {
            "model": self.source,
            "device": str(loaded.device),
            "dtype": loaded.dtype,
            "protocol": "embeddings",
            "window": length,
            "batch": self.batch,
            "documents": sum(len(each["input_ids"]) for each in batches),
            "text": str(self.text),
            "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "rows": beside_plain(rows),
            "complete": True,
        }
        if self.output is not None:
            write_json(self.output, result)
        return result

    def _length(self, loaded: LoadedModel) -> int:
        from mixq_compile.evaluation.scoring import context_length

        wanted = self.window or DEFAULT_LENGTH
        return min(wanted, context_length(loaded.model) or wanted)

    def _batches(
        self, loaded: LoadedModel, content: str, length: int, limit: int, source: Path
    ) -> list[Inputs]:
        """Whole batches of the first rows, padded to one length: a compiled model meets one shape."""
        accepted = inspect.signature(loaded.model.forward).parameters
        if "input_ids" not in accepted:
            raise MixqError(
                f"{self.source} is a {type(loaded.model).__name__}, which does not read text (input_ids)."
            )
        rows = text_rows(content, length)[:limit]
        rows = rows[: len(rows) // self.batch * self.batch]
        if not rows:
            raise OptionError(
                f"{source} has fewer than {self.batch} lines of {length // 2} words or more, and --limit "
                f"takes {limit}: give a longer text, a smaller --batch or --window."
            )
        tokenizer = loaded.required_tokenizer()
        encoded = encode(rows, tokenizer, length, getattr(loaded.config, "vocab_size", 0))
        named = {name: value.to(loaded.device) for name, value in encoded.items() if name in accepted}
        return [
            {name: value[start : start + self.batch] for name, value in named.items()}
            for start in range(0, len(rows), self.batch)
        ]

    def _references(self, loaded: LoadedModel, batches: Sequence[Inputs]) -> list[Reference]:
        from mixq_compile.evaluation.embeddings import Reference

        model = loaded.model if loaded.dtype == "float32" else copy.deepcopy(loaded.model).float()
        found = []
        for inputs in batches:
            hidden = _hidden(model, inputs, self.source)
            kept = inputs.get("attention_mask", inputs["input_ids"] >= 0).bool()
            found.append(Reference(hidden, kept, is_encoder=True))
        return found

    def _statistics(self, loaded: LoadedModel, length: int) -> CalibrationStats | None:
        from mixq_compile.calibration import CalibrationStats, calibrate

        if self.stats is not None:
            return CalibrationStats.load(self.stats)
        if self.calibrate_text is None:
            needing = [choice.label for choice in self.choices if choice.needs_statistics]
            if needing:
                raise OptionError(
                    f"{', '.join(needing)} makes weights with statistics: give --calibrate-text, another "
                    "text than the one compared on, or --stats."
                )
            return None
        content = read_text(self.calibrate_text)
        batches = self._batches(loaded, content, length, CALIBRATION_ROWS, self.calibrate_text)
        kinds = tuple({kind: None for choice in self.choices for kind in choice.kinds})
        with step(f"calibrating on {self.calibrate_text}", spinner=False):
            return calibrate(loaded.model, batches, kinds=kinds or ("channels",))

    def _runs(self, loaded: LoadedModel, stats: CalibrationStats | None) -> list[_Run]:
        """Full precision under the same compiler first, then each scheme on a copy of the model."""
        import torch

        torch.compiler.reset()
        compiled = torch.compile(loaded.model, backend=self.lowering)
        runs = [_Run(f"{loaded.dtype} ({self.lowering})", compiled)]
        for choice in self.choices:
            calibrated = stats is not None and choice.takes_statistics
            options = {**choice.options, "force": self.force, "lowering": self.lowering}
            options |= {"stats": stats} if calibrated else {}
            fast = torch.compile(copy.deepcopy(loaded.model), backend="mixq", options=options)
            runs.append(_Run(choice.label, fast, choice, calibrated))
        return [*runs, *(_Run(label, call) for label, call in self.others.items())]

    def _row(self, run: _Run, batches: Sequence[Inputs], references: Sequence[Reference]) -> dict[str, Any]:
        import torch

        from mixq_compile.evaluation.embeddings import Reference
        from mixq_compile.runtime.report import report as report_on

        with step(run.label):
            for inputs in batches:  # compiles, and learns outlier columns
                _hidden(run.call, inputs, self.source)
            outputs = [_hidden(run.call, inputs, self.source) for inputs in batches]
        whole = Reference(
            torch.cat([each.output for each in references]),
            torch.cat([each.kept for each in references]),
            is_encoder=True,
        )
        error, cosine = whole.compare(torch.cat(outputs))
        report = report_on(run.call) if run.choice is not None else None
        notes = [] if report is None else linear_notes(report, is_forced=self.force)
        if run.calibrated:
            notes.append(f"calibrated on {self.stats or self.calibrate_text}")
        return {
            "label": run.label,
            "scheme": run.choice.options["scheme"] if run.choice is not None else "none",
            "relative_error": error,
            "cosine": cosine,
            **linear_figures(report),
            "notes": notes,
        }


def _time(runs: Sequence[_Run], batches: Sequence[Inputs]) -> None:
    """Interleaved, in another order each round, so that noise hits all alike; seconds of a batch."""
    for number in range(ROUNDS):
        shift = number % len(runs)
        for run in [*runs[shift:], *runs[:shift]]:
            begin = time.perf_counter()
            for inputs in batches:
                _hidden(run.call, inputs, "")
            run.seconds.append((time.perf_counter() - begin) / len(batches))


def _hidden(call: Any, inputs: Inputs, source: str) -> Tensor:
    """The last hidden state `[B, T, D]`, finished on the device, in memory of its own."""
    import torch

    with torch.no_grad():
        output = call(**inputs)
    found: Tensor | None = getattr(output, "last_hidden_state", None)
    if found is None:
        raise MixqError(
            f"{source} returned a {type(output).__name__} without last_hidden_state: the protocol embeddings "
            "compares encoders. Language models take the other protocols."
        )
    if found.is_cuda:
        torch.cuda.synchronize(found.device)
    return found.clone()
