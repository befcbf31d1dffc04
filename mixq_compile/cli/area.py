"""`mixq area`: circuit area of a model's linears, by scheme and against error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixq_compile.area.assumptions import FOLDINGS, TECHNOLOGIES, Assumptions
from mixq_compile.area.linear_areas import ESTIMATES, NEEDS_COLUMNS, LinearSize
from mixq_compile.cli.inspection_options import CaptureOptions, PipelineChoice
from mixq_compile.cli.options import Json, StatsFile, Threshold, one_of, valid
from mixq_compile.cli.output import print_json
from mixq_compile.errors import MixqError, OptionError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mixq_compile.area.model_areas import Layer, ModelAreas
    from mixq_compile.cli.area_errors import Measured
    from mixq_compile.inspection.layers import LayerSummary

ALL = "all"
FINDS_COLUMNS = "w8a8o16"
"""The scheme that finds out which linears can be quantized, and how many outlier columns each has."""


def parse_schemes(text: str) -> tuple[str, ...]:
    """The schemes that a text such as `fp16,awq` or `all` names. Raises OptionError for an unknown one."""
    if text == ALL:
        return tuple(ESTIMATES)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in ESTIMATES:
            raise unknown_name("scheme", name, [ALL, *ESTIMATES])
    if not names:
        raise OptionError("no scheme was given.")
    return tuple(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class CircuitOptions:
    """How the circuit is laid out, and what is counted."""

    lanes: Annotated[
        int, typer.Option(min=1, help="Elements of a dot product that are multiplied in one cycle.")
    ] = 16
    technology: Annotated[
        str,
        typer.Option(
            callback=one_of("technology", TECHNOLOGIES),
            help="What area is counted in: nand2 (equivalents), lut6 or um2-45nm.",
        ),
    ] = "nand2"
    folding: Annotated[
        str,
        typer.Option(
            callback=one_of("folding", FOLDINGS),
            help="none: every stage is as wide as the main dot product; rate-matched: as its work asks.",
        ),
    ] = "none"

    def assumptions(self) -> Assumptions:
        """The options as assumptions; groups of weights divide the input features, as models have them."""
        return Assumptions(
            lanes_k=self.lanes,
            technology=self.technology,  # type: ignore[arg-type]
            folding=self.folding,  # type: ignore[arg-type]
            groups="inputs",
        )


@dataclasses.dataclass(frozen=True)
class SizeOptions:
    """What a linear's area depends on beside its shape."""

    rows: Annotated[int, typer.Option(min=1, help="Rows of X: tokens that are computed.")] = 1
    rank: Annotated[int, typer.Option(min=1, help="Rank of LQER; smaller in linears that are smaller.")] = 32
    group: Annotated[
        int, typer.Option(min=1, help="Input features that share a scale in AWQ, GPTQ and Atom.")
    ] = 128
    columns: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Outlier columns of every linear.  [dim]\\[default: those of --stats, else those that a "
            "run of the model finds][/dim]",
        ),
    ] = None

    def of(self, layer: LayerSummary) -> LinearSize:
        """The size of one linear, its outlier columns not yet known."""
        return LinearSize(
            layer.out_features, layer.in_features, self.rows, rank=self.rank, group_size=self.group
        )


def area(
    capture: CaptureOptions,
    circuit: CircuitOptions,
    sizes: SizeOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Hugging Face directory or hub name, module:function, an exported .pt2, a saved inspection, "
            "or the shape of a known model (llama-2-7b …).",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(callback=valid(parse_schemes), help=f"Comma-separated, or all: {', '.join(ESTIMATES)}."),
    ] = ALL,
    stats: StatsFile = None,
    threshold: Threshold = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Name, part of a name or glob pattern of linears to leave out; repeatable."),
    ] = None,
    errors: Annotated[
        bool,
        typer.Option("--errors/--no-errors", help="Run the model and measure or simulate each SQNR."),
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write JSON, Markdown and a plot of area against error there."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare all schemes in the setting of a published table.")
    ] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="Synthesize circuits, and compare estimates with them.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --validate: fewer circuits.")] = False,
    json: Json = False,
) -> None:
    """Estimate the circuit area of a model's linears under quantization schemes, and what error it buys.

    Counted are the units of a dot product and of the stages beside it: casts, scales, outlier columns, low
    rank. Memory, routing and control are not. With fixed lanes the area does not depend on the linear's
    size, the cycles do: compare area × cycles. Two digits are significant.

    The number of outlier columns is never guessed: it comes from --columns, --stats, or a run of the model.
    Errors of mixq's own schemes are measured; of others the number formats are simulated, without their
    calibration.

    Example: [bold]mixq area MODEL --scheme fp16,w8a8o16,awq[/bold]  ·
    [bold]mixq area llama-2-7b --columns 40 --folding rate-matched[/bold]  ·  [bold]mixq area --compare[/bold]
    ·  [bold]mixq area --validate --quick[/bold]
    """
    if validate:
        _validate(quick=quick, json=json)
        return
    if quick:
        raise OptionError("--quick belongs to --validate.")
    if compare:
        _compare(circuit.assumptions(), output, json=json)
        return
    if model is None:
        raise OptionError("nothing to estimate: give MODEL, or --compare, or --validate.")
    assumptions = circuit.assumptions()
    choice = PipelineChoice(scheme=FINDS_COLUMNS, stats=stats, threshold=threshold, ignore=ignore, force=True)
    wanted = parse_schemes(scheme)
    seen = _seen_layers(model, capture, choice, wanted, errors=errors, sizes=sizes)
    estimated = [layer for layer in seen.layers if layer.size.in_features >= assumptions.lanes_k]
    notes = list(seen.notes)
    if len(estimated) < len(seen.layers):
        narrow = [layer.fqn for layer in seen.layers if layer not in estimated]
        notes.append(f"left out, with fewer input features than lanes: {', '.join(narrow)}.")
    if not estimated:
        raise MixqError(
            f"{model}: there is no linear to estimate. {' '.join(notes) or 'The passes saw none.'}"
        )
    schemes, unknown = _with_known_columns(estimated, wanted, chosen=scheme != ALL)
    if unknown:
        notes.append(
            f"left out, since the number of outlier columns is not known: {', '.join(unknown)}. Give "
            "--columns N, or --stats of a calibration."
        )
    from mixq_compile.area.model_areas import model_areas

    made = model_areas(estimated, schemes, assumptions)
    _show(model, made, notes, output, json=json)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The linears of a model, and what a reader should know about them."""

    layers: tuple[Layer, ...]
    notes: tuple[str, ...]


def _seen_layers(
    model: str,
    capture: CaptureOptions,
    choice: PipelineChoice,
    schemes: Sequence[str],
    *,
    errors: bool,
    sizes: SizeOptions,
) -> _Seen:
    """The linears that can be quantized, with outlier columns and errors where those are known."""
    from mixq_compile.area.model_areas import Layer
    from mixq_compile.cli.area_errors import Measured, measured_errors
    from mixq_compile.cli.inspecting import WITHOUT_WEIGHTS, inspection_of_captured
    from mixq_compile.inspection.files import is_inspection_file, load_inspection

    notes: list[str] = []
    path = Path(model).expanduser()
    measured = Measured()
    saved = is_inspection_file(path)
    if saved:
        inspection = load_inspection(path)
    else:
        options = choice.options()  # before the model is loaded: wrong options are found at once
        captured = capture.capture(model)
        inspection = inspection_of_captured(captured, choice, options, errors=False)
    graph = inspection.graphs[0]
    found = [layer for layer in graph.layers if layer.scheme is not None]
    sized = {layer.fqn: sizes.of(layer) for layer in found}
    if saved:
        measured = _saved(found)
    elif not captured.has_weights or captured.model is None:
        notes.append(WITHOUT_WEIGHTS)
    elif errors or (sizes.columns is None and set(schemes) & NEEDS_COLUMNS):
        measured = measured_errors(captured, graph.history, schemes, sized, choice.threshold, errors=errors)
    left = [f"{layer.fqn} ({layer.skip})" for layer in graph.layers if layer.scheme is None]
    if left:
        notes.append(f"no scheme quantizes these, and no figure holds them: {', '.join(left)}.")
    layers = []
    for layer in found:
        columns = sizes.columns
        if columns is None and (choice.stats is not None or layer.calibrated_columns):
            columns = layer.calibrated_columns
        if columns is None:
            columns = measured.columns.get(layer.fqn)
        size = dataclasses.replace(sized[layer.fqn], outlier_columns=columns)
        known = {
            scheme: of[layer.fqn]
            for scheme, of in measured.sqnr_db.items()
            if errors and scheme in schemes and layer.fqn in of
        }
        layers.append(Layer(layer.fqn, size, known))
    return _Seen(tuple(layers), tuple(notes))


def _saved(layers: Sequence[LayerSummary]) -> Measured:
    """The errors and outlier columns that a saved inspection holds."""
    from mixq_compile.cli.area_errors import Measured

    errors: dict[str, dict[str, float]] = {}
    for layer in layers:
        if layer.scheme is not None and layer.sqnr_db is not None:
            errors.setdefault(layer.scheme, {})[layer.fqn] = layer.sqnr_db
    columns = {layer.fqn: layer.found_columns for layer in layers if layer.found_columns is not None}
    return Measured(errors, columns)


def _with_known_columns(
    layers: Sequence[Layer], schemes: Sequence[str], *, chosen: bool
) -> tuple[list[str], list[str]]:
    """The schemes that can be estimated and those that cannot; an error where those were chosen by name."""
    from mixq_compile.area.model_areas import without_columns

    unknown = without_columns(layers, schemes)
    if unknown and chosen:
        raise OptionError(
            f"the area of {', '.join(unknown)} depends on the number of outlier columns, which is not known "
            "without the model's weights: give --columns N, or --stats of a calibration."
        )
    return [scheme for scheme in schemes if scheme not in unknown], unknown


def _show(model: str, made: ModelAreas, notes: Sequence[str], output: Path | None, *, json: bool) -> None:
    from mixq_compile.cli.area_results import model_document, write

    data = {"model": model, "notes": list(notes), **made.to_json()}
    document = model_document(model, made, notes)
    if output is not None:
        write(output, data, document, made)
    if json:
        print_json(data)
    else:
        document.print()


def _compare(assumptions: Assumptions, output: Path | None, *, json: bool) -> None:
    from mixq_compile.area.comparison import compare
    from mixq_compile.cli.area_results import comparison_document, write

    found = compare(dataclasses.replace(assumptions, groups="outputs"))
    document = comparison_document(found)
    if output is not None:
        write(output, found.to_json(), document)
    if json:
        print_json(found.to_json())
    else:
        document.print()


def _validate(*, quick: bool, json: bool) -> None:
    """Compares estimates with synthesis. Raises MixqError where one is beyond its bound."""
    from mixq_compile.area.validation import as_text, validate
    from mixq_compile.cli.output import step

    with step("synthesizing circuits"):
        rows = validate(quick=quick)
    if json:
        print_json(
            [
                {**dataclasses.asdict(row), "error": row.error, "bound": row.bound, "holds": row.holds}
                for row in rows
            ]
        )
    else:
        print(as_text(rows))
    beyond = sum(not row.holds for row in rows)
    if beyond:
        raise MixqError(f"{beyond} of {len(rows)} estimates are beyond their bounds.")
