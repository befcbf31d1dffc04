"""What `mixq bench generate` is told and finds, and how that is shown."""

from __future__ import annotations

from dataclasses import dataclass

from mixq_compile.benchmarking.choices import check_replays
from mixq_compile.benchmarking.environment import Environment
from mixq_compile.benchmarking.results import Document, Plot, Table, geometric_mean, number
from mixq_compile.errors import OptionError

NAME = "generate"
FLOAT_NAMES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class GenerateOptions:
    """What `mixq bench generate` measures, and how."""

    model: str = "llama-2-7b"
    layers: int | None = None
    """None: all of the model."""
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    """Tokens of each prompt."""
    new: int = 128
    """Tokens that are generated, the Decode Length."""
    schemes: tuple[str, ...] = ("w8a8o16",)
    unprepared: bool = False
    """Measure `generate()` as transformers runs it, too."""
    replays: int = 5
    dtype: str = "bfloat16"
    lowering: str = "inductor"

    def __post_init__(self) -> None:
        check_replays(self.replays)
        if self.new < 2:
            raise OptionError("at least 2 new tokens are needed: the first is the prompt's.")

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.new


@dataclass(frozen=True)
class GenerateCase:
    """One variant at one batch."""

    variant: str
    batch: int
    decode_tokens_per_second: float
    whole_tokens_per_second: float
    """Of all new tokens over the whole time, the prompt's too."""
    first_token_ms: float
    step_ms: float
    host_share_ms: float | None
    """What `generate()` takes for a step whose forward is empty; None where the model is not prepared."""
    step_without_host_share_ms: float | None
    memory_bytes: int | None
    """The most that was allocated on the GPU; None on a CPU."""
    weight_bytes: int
    cache_bytes: int | None
    first_call_seconds: float
    """Of the first call, compilations included."""
    compiled_graphs: int
    graphs_of_another_length: int
    """Compiled for a second prompt, of another length: 0 where the preparation holds."""


def document(options: GenerateOptions, environment: Environment, cases: list[GenerateCase]) -> Document:
    """The result of the cases measured so far."""
    measured = tuple(sorted(cases, key=lambda case: case.batch))
    return Document(
        benchmark=NAME,
        environment=environment,
        options=options,
        cases=measured,
        summary=_summary(measured),
        missing={},
        tables=(_table(measured, options),),
        plots=_plots(measured, options),
    )


def _base(cases: tuple[GenerateCase, ...], case: GenerateCase) -> GenerateCase | None:
    """The unquantized model at the same batch, prepared."""
    same = (each for each in cases if each.batch == case.batch)
    return next((each for each in same if each.variant in FLOAT_NAMES), None)


def _over(base: float | None, value: float | None) -> float | None:
    # The share is measured apart from the step, so that what is left of a short one can fall below nothing.
    return None if base is None or value is None or min(base, value) <= 0 else base / value


def _summary(cases: tuple[GenerateCase, ...]) -> dict[str, float | None]:
    summary: dict[str, float | None] = {}
    for name in dict.fromkeys(case.variant for case in cases):
        own = [case for case in cases if case.variant == name]
        pairs = [
            (base, case) for case in own if (base := _base(cases, case)) is not None and base is not case
        ]
        if not pairs:
            continue
        title = f"{name} over {pairs[0][0].variant}"
        summary[f"{title}, whole step: geometric mean"] = geometric_mean(
            _over(base.step_ms, case.step_ms) for base, case in pairs
        )
        summary[f"{title}, step without transformers' share: geometric mean"] = geometric_mean(
            _over(base.step_without_host_share_ms, case.step_without_host_share_ms) for base, case in pairs
        )
    return summary


def _table(cases: tuple[GenerateCase, ...], options: GenerateOptions) -> Table:
    rows = []
    for case in cases:
        base = _base(cases, case)
        over = None if base is None else _over(base.step_ms, case.step_ms)
        without = (
            None if base is None else _over(base.step_without_host_share_ms, case.step_without_host_share_ms)
        )
        rows.append(
            (
                str(case.batch), str(options.new), number(case.decode_tokens_per_second, 1),
                _gibibytes(case.memory_bytes), case.variant, number(over), number(case.first_token_ms, 1),
                number(case.step_ms, 3), number(case.host_share_ms, 3),
                number(case.step_without_host_share_ms, 3), number(without), _gibibytes(case.weight_bytes),
                number(case.first_call_seconds, 1), str(case.graphs_of_another_length),
            )
        )  # fmt: skip
    return Table(
        f"{options.model}: generate() after prompts of {options.prompt} tokens",
        (
            "Batch Size", "Decode Length", "Decode tokens/s", "Memory (VRAM)", "variant", "over 16 bit",
            "first token ms", "step ms", "transformers' share ms", "step without ms", "over 16 bit, without",
            "weights GiB", "first call s", "compiled for another length",
        ),
        tuple(rows),
        "Medians of whole calls, prompt subtracted. The share is a step's time with an empty forward; where "
        "the host works while the device does, a step without it is a lower bound. Memory in GiB.",
    )  # fmt: skip


def _gibibytes(count: int | None) -> str:
    return number(None if count is None else count / 2**30, 3)


def _plots(cases: tuple[GenerateCase, ...], options: GenerateOptions) -> tuple[Plot, ...]:
    names = list(dict.fromkeys(case.variant for case in cases))
    batches = list(dict.fromkeys(case.batch for case in cases))
    found = {(case.variant, case.batch): case.decode_tokens_per_second for case in cases}
    series = {name: [found.get((name, batch)) for batch in batches] for name in names}
    groups = tuple(f"batch {batch}" for batch in batches)
    return (Plot(f"{options.model}, generate()", "decode tokens/s", groups, series),)
