"""`mixq eval`: what quantization costs in perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixq_compile.cli.options import (
    Capacity,
    Device,
    Dtype,
    Force,
    Json,
    Lowering,
    Miss,
    ModelArgument,
    StatsFile,
    TextFile,
    Threshold,
    one_of,
)
from mixq_compile.cli.output import console, mebibytes, print_json, print_table
from mixq_compile.errors import OptionError
from mixq_compile.schemes.registry import accepted_names

if TYPE_CHECKING:
    from rich.console import Console

SCHEMES = ", ".join(accepted_names())
DEFAULT_SCHEME = "w8a8o16"
EMBEDDINGS = "embeddings"
PROTOCOL_NAMES = ("gptq", "llamacpp", "windows", "stories", EMBEDDINGS)


def evaluate(
    model: ModelArgument,
    text: TextFile,
    protocol: Annotated[
        str,
        typer.Option(
            callback=one_of("protocol", PROTOCOL_NAMES),
            help="gptq (windows of 2048, the standard), llamacpp (512, second half scored), windows (512, "
            "each with BOS, which Gemma needs), stories (texts between <|endoftext|>), or, for encoders, "
            "embeddings (lines of the text, padded to 128 tokens).",
        ),
    ] = "gptq",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many windows, stories or lines.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=4, help="Tokens read together, in place of the protocol's.")
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help=f"{SCHEMES}, or none; repeatable. With options of its own: "
            '"w4a4o16{threshold=inf}".  [dim]\\[default: w8a8o16][/dim]',
        ),
    ] = None,
    threshold: Threshold = None,
    capacity: Capacity = None,
    miss: Miss = None,
    stats: StatsFile = None,
    calibrate_text: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, readable=True, help="Text to calibrate on, in place of --stats."
        ),
    ] = None,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Let 4-bit schemes find their columns while running.")
    ] = False,
    force: Force = False,
    batch: Annotated[int, typer.Option(min=1, help="Windows run together.")] = 1,
    generate: Annotated[
        int, typer.Option("--generate", min=0, metavar="N", help="Also write N tokens of greedy text.")
    ] = 0,
    prompt: Annotated[
        str | None,
        typer.Option(help="What that text begins with.  [dim]\\[default: the text's first words][/dim]"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, metavar="FILE", help="Also write the figures to this JSON file, window by window."
        ),
    ] = None,
    json: Json = False,
    lowering: Lowering = "inductor",
) -> None:
    """Measure what schemes cost: perplexity, KL divergence, agreement or error, time, memory.

    A language model in full precision and those of schemes, as many as memory holds, read window after
    window. KL is the mean divergence of a token's distribution from full precision's, top-1 the share of
    tokens for which both think the same most likely; ± are standard errors over windows. Time is of a
    window's call, beside that of w8a8 where it is among the schemes.

    Of an encoder (--protocol embeddings) the error is that of the tokens' vectors, the cosine that between
    embeddings, the mean over a text's tokens; its time is beside full precision's, compiled alike.

    The quantized models run through torch.compile(model, backend="mixq"). Schemes with 4-bit activations
    need calibration: give --stats or --calibrate-text; else they are calibrated on the part of --text
    that --limit leaves out. Figures of different protocols or texts do not compare, so both are printed.

    Example: [bold]mixq eval MODEL --text wiki.test.raw --scheme w8a8o16 --scheme w4a4o16[/bold]
    """
    from mixq_compile.cli.evaluating import Evaluation
    from mixq_compile.cli.evaluating_embeddings import EncoderEvaluation
    from mixq_compile.cli.scheme_choice import parse_choice

    if stats is not None and calibrate_text is not None:
        raise OptionError("--stats and --calibrate-text exclude each other: give one of them.")
    if output is not None and not output.parent.is_dir():
        raise OptionError(f"--output {output}: there is no folder {output.parent}.")
    common = {"threshold": threshold, "capacity": capacity, "miss": miss}
    choices = [parse_choice(entry, common) for entry in scheme or [DEFAULT_SCHEME]]
    chosen = tuple(choice for choice in choices if choice is not None)
    if protocol == EMBEDDINGS:
        if generate or prompt is not None or no_calibrate:
            raise OptionError("--generate, --prompt and --no-calibrate are for language models.")
        compared = EncoderEvaluation(
            source=model, text=text, limit=limit, window=window, batch=batch, stats=stats,
            calibrate_text=calibrate_text, choices=chosen, force=force, lowering=lowering, device=device,
            dtype=dtype, output=output,
        ).run()  # fmt: skip
        print_json(compared) if json else _print_encoder(console(), compared)
        return
    evaluation = Evaluation(
        source=model, text=text, protocol=protocol, limit=limit, window=window, batch=batch,
        stats=stats, calibrate_text=calibrate_text, calibrates=not no_calibrate,
        choices=chosen, explicit=bool(scheme),
        force=force, lowering=lowering, tokens=generate, prompt=prompt, device=device, dtype=dtype,
        output=output,
    )  # fmt: skip
    result = evaluation.run()
    if json:
        print_json(result)
    else:
        _print(console(), result)


def _print(target: Console, result: dict[str, Any]) -> None:
    rows = [_cells(row) for row in result["rows"]]
    figures = ("perplexity", "change %", "KL", "top-1 %", "linears", "bits", "16 bit %", "MiB", "ms", "w8a8")
    columns = ("", *figures)
    print_table(target, f"{result['model']} on {result['device']}", columns, rows)
    target.print(
        f"protocol {result['protocol']}, window {result['window']}, {result['tokens_scored']} tokens scored "
        f"in {result['documents']} documents; text {result['text']}, sha256 {result['text_sha256']}",
        markup=False,
    )
    spread = result["rows"][0]["perplexity_error"]
    if spread is not None:
        target.print(
            f"perplexity ± {spread:.3f} by the choice of windows, a change by the ± beside it; 16 bit: "
            "columns kept, mean / most of a linear; MiB: all linears; w8a8: time beside it",
            markup=False,
        )
    for row in result["rows"]:
        for note in row["notes"]:
            target.print(f"{row['label']}: {note}", markup=False)
    if result["prompt"] is not None:
        _print_texts(target, result)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    compared, error = row["delta_share"] is not None, row["delta_share_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    return (
        row["label"],
        f"{row['perplexity']:.3f}",
        f"{100 * row['delta_share']:+.2f}{spread}" if compared else "",
        "" if row["kl"] is None else f"{row['kl']:.4f}",
        "" if row["top1"] is None else f"{100 * row['top1']:.1f}",
        *_linear_cells(row),
        f"{1000 * row['seconds']:.0f}",
        "" if row["time_beside_w8a8"] is None else f"{row['time_beside_w8a8']:.2f}x",
    )


def _print_encoder(target: Console, result: dict[str, Any]) -> None:
    figures = ("error", "cosine", "linears", "bits", "16 bit %", "MiB", "ms", "speedup", "w8a8")
    rows = [
        (
            row["label"],
            f"{row['relative_error']:.4f}",
            f"{row['cosine']:.5f}",
            *_linear_cells(row),
            f"{1000 * row['seconds']:.0f}",
            f"{row['speedup']:.2f}x",
            "" if row["time_beside_w8a8"] is None else f"{row['time_beside_w8a8']:.2f}x",
        )
        for row in result["rows"]
    ]
    print_table(target, f"{result['model']} on {result['device']}", ("", *figures), rows)
    target.print(
        f"{result['documents']} lines in batches of {result['batch']} x {result['window']} tokens; error of "
        f"the tokens' vectors, cosine of embeddings; text {result['text']}, sha256 {result['text_sha256']}",
        markup=False,
    )
    for row in result["rows"]:
        for note in row["notes"]:
            target.print(f"{row['label']}: {note}", markup=False)


def _linear_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Linears quantized, bits of a weight, columns in 16 bit, and memory."""
    share = row["outlier_share"]
    return (
        "" if row["linears"] is None else f"{row['quantized']}/{row['linears']}",
        "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}",
        "" if share is None else f"{100 * share['mean']:.1f}/{100 * share['max']:.1f}",
        "" if row["linear_bytes"] is None else mebibytes(row["linear_bytes"]),
    )


def _print_texts(target: Console, result: dict[str, Any]) -> None:
    target.print(
        "\nGreedy text through generate() with a static cache. The backend compiles the decoding steps; "
        "the prompt is read by the uncompiled model.",
    )
    for row in result["rows"]:
        agreement = row["agreement"]
        same = f" (the first {agreement['equal_tokens']} tokens are the same)" if agreement else ""
        target.print(f"\n{row['label']}{same}", style="bold", markup=False)
        target.print(f"{result['prompt']}{row['generated']}", markup=False)
