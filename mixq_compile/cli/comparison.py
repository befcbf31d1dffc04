"""What `mixq demo` measures: one model, eager and compiled in three ways, on one batch."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mixq_compile.cli.models import LoadedModel
from mixq_compile.cli.output import step
from mixq_compile.cli.texts import documentation, encode
from mixq_compile.errors import MixqError

if TYPE_CHECKING:
    from torch import Tensor

    from mixq_compile.evaluation.embeddings import Reference
    from mixq_compile.runtime.report_tables import Report

NAIVE_SCHEME = "w8a8"
REASONS_SHOWN = 3
EAGER, INDUCTOR, MIXQ, NAIVE = "eager", "inductor", "mixq", "naive"


@dataclass
class Variant:
    """One way to run the model."""

    name: str
    label: str
    call: Any
    """The model, or the compiled one."""
    seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    output: Any = None
    """The last hidden state or the logits, after timing."""
    said: list[str] = field(default_factory=list)
    """Warnings of the first call."""


@dataclass(frozen=True)
class Comparison:
    """One call of `mixq demo`."""

    loaded: LoadedModel
    batch: int
    length: int
    scheme: str
    threshold: float | str | None
    force: bool
    repeats: int
    lowering: str

    @property
    def uses_cuda_graphs(self) -> bool:
        """True where the compiled variants run as CUDA graphs."""
        return self.loaded.device.type == "cuda" and self.lowering == "inductor"

    def run(self) -> dict[str, Any]:
        """Compiles, times and compares; the result as JSON-able data."""
        import torch

        from mixq_compile.runtime.report import report

        torch.compiler.reset()
        inputs = self._inputs()
        with step("full precision (float32)"):
            reference = self._reference(inputs)
        variants = self._variants()
        for variant in variants:
            self._first_call(variant, inputs)
        with step(f"timing {self.repeats} rounds"):
            self._time(variants, inputs)
        reports = {}
        for variant in variants:
            if variant.name in (MIXQ, NAIVE):
                with warnings.catch_warnings():
                    # The note about linears left alone says it already.
                    warnings.simplefilter("ignore")
                    reports[variant.name] = report(variant.call)
        return self._result(variants, reference, inputs, reports)

    def _inputs(self) -> dict[str, Any]:
        from mixq_compile.evaluation.scoring import context_length

        model, config = self.loaded.model, self.loaded.config
        accepted = inspect.signature(model.forward).parameters
        vocabulary = getattr(config, "vocab_size", None)
        if "input_ids" not in accepted or vocabulary is None or getattr(config, "is_encoder_decoder", False):
            raise MixqError(
                f"{self.loaded.source} is a {type(model).__name__}, and the demo runs models that read one "
                "text: encoders such as BERT and decoders such as Llama. Others run as well: "
                'torch.compile(model, backend="mixq").'
            )
        length = min(self.length, context_length(model) or self.length)
        texts = documentation(self.batch, length)
        inputs: dict[str, Any] = dict(encode(texts, self.loaded.tokenizer, length, vocabulary))
        inputs = {name: value.to(self.loaded.device) for name, value in inputs.items() if name in accepted}
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return inputs

    def _reference(self, inputs: dict[str, Any]) -> Reference:
        from mixq_compile.evaluation.embeddings import Reference

        model = self.loaded.model
        if self.loaded.dtype != "float32":
            model = copy.deepcopy(model).float()
        output = _run(model, inputs)
        kept = inputs.get("attention_mask", inputs["input_ids"] >= 0).bool()
        return Reference(_result_of(output), kept, is_encoder=hasattr(output, "last_hidden_state"))

    def _variants(self) -> list[Variant]:
        import torch

        model = self.loaded.model
        name = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.loaded.dtype]
        options: dict[str, Any] = {"force": self.force, "lowering": self.lowering}
        chosen = {**options, "scheme": self.scheme, "threshold": self.threshold}
        naive = {**options, "scheme": NAIVE_SCHEME}
        # Copies, so that packed weights and outlier states of the two schemes stay apart.
        first, second = copy.deepcopy(model), copy.deepcopy(model)
        # On a GPU a small model waits for its launches: CUDA graphs for all, as one would run it.
        mode = "reduce-overhead" if self.uses_cuda_graphs else None
        chosen["mode"] = naive["mode"] = mode
        compiled = torch.compile(model, backend=self.lowering, dynamic=False, mode=mode)
        fast = torch.compile(first, backend="mixq", dynamic=False, options=chosen)
        plain = torch.compile(second, backend="mixq", dynamic=False, options=naive)
        return [
            Variant(EAGER, f"eager {name}", model),
            Variant(INDUCTOR, f"Inductor {name}", compiled),
            Variant(MIXQ, f"mixq {self.scheme}", fast),
            Variant(NAIVE, f"plain int8 ({NAIVE_SCHEME})", plain),
        ]

    def _first_call(self, variant: Variant, inputs: dict[str, Any]) -> None:
        what = variant.label if variant.name == EAGER else f"compiling {variant.label}"
        with step(what), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            begin = time.perf_counter()
            _run(variant.call, inputs)
            if variant.name != EAGER:
                variant.first_call_seconds = time.perf_counter() - begin
            # Once more: the first call may have found new outlier columns or filled caches.
            _run(variant.call, inputs)
        variant.said = [str(entry.message) for entry in caught if "mixq" in str(entry.message)]

    def _time(self, variants: list[Variant], inputs: dict[str, Any]) -> None:
        """Interleaved, in another order each round, so that noise hits all alike."""
        for number in range(self.repeats):
            shift = number % len(variants)
            for variant in [*variants[shift:], *variants[:shift]]:
                begin = time.perf_counter()
                _run(variant.call, inputs)
                variant.seconds.append(time.perf_counter() - begin)
        for variant in variants:
            # A copy: the next CUDA graph may write where this one's result is.
            variant.output = _result_of(_run(variant.call, inputs)).clone()

    def _result(
        self,
        variants: list[Variant],
        reference: Reference,
        inputs: dict[str, Any],
        reports: dict[str, Report],
    ) -> dict[str, Any]:
        medians = {variant.name: statistics.median(variant.seconds) for variant in variants}
        report = reports[MIXQ]
        rows = []
        for variant in variants:
            error, cosine = reference.compare(variant.output)
            own = reports.get(variant.name)
            linears = (own or report).linears
            rows.append(
                {
                    "name": variant.name,
                    "label": variant.label,
                    "milliseconds": 1000 * medians[variant.name],
                    "speedup_over_eager": medians[EAGER] / medians[variant.name],
                    "speedup_over_inductor": medians[INDUCTOR] / medians[variant.name],
                    "linear_bytes": sum(
                        entry.bytes_after if own else entry.bytes_before for entry in linears
                    ),
                    "relative_error": error,
                    "cosine": cosine,
                    "first_call_seconds": variant.first_call_seconds,
                    "quantized": len(own.quantized) if own else 0,
                    "linears": len(linears),
                    "seconds": variant.seconds,
                }
            )
        batch, length = inputs["input_ids"].shape
        return {
            "model": self.loaded.source,
            "device": str(self.loaded.device),
            "device_name": device_name(self.loaded.device),
            "dtype": self.loaded.dtype,
            "batch": batch,
            "length": length,
            "text": "documentation strings of the installed Python",
            "repeats": self.repeats,
            "cuda_graphs": self.uses_cuda_graphs,
            "error_of": "last hidden state" if reference.is_encoder else "logits",
            "cosine_of": "embeddings" if reference.is_encoder else "logits",
            "rows": rows,
            "notes": self._notes(variants, report),
            "report": report.to_json(),
        }

    def _notes(self, variants: list[Variant], report: Report) -> list[str]:
        notes = []
        left = Counter(linear.skip or "" for linear in report.skipped).most_common()
        for reason, count in left[:REASONS_SHOWN]:
            notes.append(f"{count} of {len(report.linears)} linears left alone: {reason}.")
        if not report.quantized:
            notes.append(
                "so mixq changed nothing. --force quantizes every eligible linear all the same and shows "
                "the accuracy; larger batches and models gain more."
            )
        if kept := sum(linear.bytes_before for linear in report.quantized if linear.float_weight_kept):
            notes.append(
                f"under torch.compile the original weights ({kept / 2**20:.1f} MiB) stay in memory beside "
                "the codes; mixq_compile.quantize(model) or options={'release_weights': True} frees them."
            )
        notes.extend(report.advice[:REASONS_SHOWN])
        said = [
            message for variant in variants for message in variant.said if "quantized none" not in message
        ]
        return [*notes, *dict.fromkeys(said)]


def _run(call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """One forward pass, finished on the device."""
    import torch

    on_gpu = inputs["input_ids"].is_cuda
    if on_gpu:
        torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        output = call(**inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return output


def _result_of(output: Any) -> Tensor:
    """The last hidden state of an encoder, the logits of a decoder."""
    found: Tensor | None = getattr(output, "last_hidden_state", None)
    if found is None:
        found = getattr(output, "logits", None)
    if found is None:
        raise MixqError(
            f"the model returned a {type(output).__name__} with neither last_hidden_state nor logits, "
            "so there is nothing to compare."
        )
    return found


def device_name(device: Any) -> str:
    """What a device is called in a result."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU ({torch.get_num_threads()} threads)"
