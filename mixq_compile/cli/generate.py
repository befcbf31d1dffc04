"""`mixq generate`: a text goes on, token by token, and how fast."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from mixq_compile.cli.options import Device, Dtype, Json, ModelArgument
from mixq_compile.cli.output import console, print_json, step
from mixq_compile.errors import MixqError, OptionError


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="The text to go on with.", show_default=False)],
    new: Annotated[int, typer.Option("--new", min=1, help="Most tokens to add.")] = 128,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample", metavar="TEMPERATURE", min=0.01, help="Draw tokens at random; else the likeliest."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile prompt and decoding first.  [dim]\\[default: on a GPU][/dim]",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Let a language model go on with a text, and say how many tokens a second it made.

    The text is written as it comes. Tokens a second are those after the first, without loading and
    compiling.

    Example: [bold]mixq generate quantized --prompt "Once upon a time"[/bold]
    """
    from mixq_compile.cli.models import load_model

    loaded = load_model(model, device, dtype)
    loaded.require_language_model()
    if not hasattr(loaded.model, "generate"):
        raise MixqError(f"{model} is a {type(loaded.model).__name__}, which has no generate().")
    tokenizer = loaded.required_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    length = int(inputs["input_ids"].shape[1])
    if not length:
        raise OptionError(f"--prompt {prompt!r} has no tokens: give a text.")
    total = length + new
    context = getattr(loaded.config, "max_position_embeddings", None)
    if context is not None and total > context:
        raise OptionError(
            f"{model} reaches {context} tokens, and {length} + {new} were asked for: lower --new."
        )
    options = _options(sample, new, tokenizer, loaded.model)
    if compiled if compiled is not None else loaded.device.type == "cuda":
        _compile(loaded.model, inputs, options, total)
    _seed(seed)
    streamer = _Streamer(tokenizer, quiet=json)
    begin = time.perf_counter()
    made = loaded.model.generate(**inputs, **options, streamer=streamer)
    seconds = time.perf_counter() - begin
    count = int(made.shape[1]) - length
    facts = {
        "text": tokenizer.decode(made[0, length:], skip_special_tokens=True),
        "prompt_tokens": length,
        "new_tokens": count,
        "seconds": seconds,
        "first_token_seconds": streamer.first - begin,
        "tokens_per_second": streamer.rate(),
        "peak_device_bytes": _peak(loaded.device),
    }
    if json:
        print_json(facts)
        return
    rate = facts["tokens_per_second"]
    speed = f", then {rate:.1f} tokens/s" if rate is not None else ""
    peak = (
        f"; at most {facts['peak_device_bytes'] / 1e9:.2f} GB on the device" if _peak(loaded.device) else ""
    )
    console(stderr=True).print(
        f"{length} tokens of prompt and the first new one: {streamer.first - begin:.2f} s; {count} new tokens"
        f"{speed}{peak}",
        style="dim",
        markup=False,
    )


def _options(sample: float | None, new: int, tokenizer: Any, model: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": sample is not None}
    if sample is not None:
        options["temperature"] = sample
    if getattr(model.generation_config, "pad_token_id", None) is None:
        options["pad_token_id"] = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return options


def _compile(model: Any, inputs: Any, options: dict[str, Any], total: int) -> None:
    from mixq_compile.runtime.generation import prepare_for_generation
    from mixq_compile.runtime.outlier_control import hold_states

    with step("compiling"):
        prepare_for_generation(model, max_length=total, batch_sizes=(1,))
        with hold_states(model):
            # Twice, because a CUDA graph is recorded by the second run.
            for _ in range(2):
                model.generate(**inputs, **{**options, "max_new_tokens": min(4, options["max_new_tokens"])})


def _seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _peak(device: Any) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class _Streamer:
    """Writes the text as it comes, and keeps the time of each token."""

    def __init__(self, tokenizer: Any, *, quiet: bool) -> None:
        self.tokenizer, self.quiet = tokenizer, quiet
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.shown = ""
        self.is_prompt = True

    def put(self, value: Any) -> None:
        """Takes the prompt first, then each token."""
        tokens = value.reshape(-1).tolist()
        if not self.is_prompt:
            self.times.append(time.perf_counter())
        self.is_prompt = False
        self.tokens += tokens
        self._show(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        # The last character may be the begin of one that several tokens make.
        if self.quiet or text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self.shown):
            return
        sys.stdout.write(text[len(self.shown) :])
        sys.stdout.flush()
        self.shown = text

    def end(self) -> None:
        """Ends the line."""
        if not self.quiet:
            sys.stdout.write("\n")
            sys.stdout.flush()

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.times[0] if self.times else time.perf_counter()

    def rate(self) -> float | None:
        """Tokens a second after the first; None where there are none."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])
