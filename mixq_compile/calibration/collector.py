"""`calibrate`: runs a model over batches with a hook on every linear."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.calibration.accumulator import InputAccumulator
from mixq_compile.calibration.arguments import arguments_of
from mixq_compile.calibration.collected import checked_kinds
from mixq_compile.calibration.collecting_memory import check_memory
from mixq_compile.calibration.linear_statistics import LinearStatistics
from mixq_compile.calibration.shared_inputs import SharedInputs
from mixq_compile.calibration.statistics import NAMES_SHOWN, CalibrationStats
from mixq_compile.errors import MixqError, OptionError
from mixq_compile.ir.linears import is_conv1d, is_plain_linear
from mixq_compile.ir.names import normalise_fqn
from mixq_compile.ir.nested_rows import nested_rows
from mixq_compile.thresholds import PAPER_THRESHOLD
from mixq_compile.version import __version__


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = None,
    progress: bool = True,
    thresholds: Sequence[float] = (PAPER_THRESHOLD,),
    kinds: Sequence[str] = ("channels",),
) -> CalibrationStats:
    """Runs `model` over `batches` and returns what the input of each of its linears looked like.

    Every exact `nn.Linear` and transformers `Conv1D` is observed, under each of its names where a
    module is shared. The model runs without gradients in eval mode, compiled parts run eagerly (a
    compiled graph calls no hooks); hooks are removed and training flags restored in any case.

        >>> batches = [tokenizer(text, return_tensors="pt") for text in texts]
        >>> stats = calibrate(model, batches, limit=128)
        >>> stats.save("stats.safetensors")

    Args:
        model: the model in 16 or 32 bit, with its weights loaded.
        batches: tensors (`model(t)`), mappings such as a tokenizer's (`model(**m)`), or tuples and
            lists (`model(*t)`); their tensors are moved to the model's device.
        limit: most batches to run; no more than these are taken from `batches`.
        progress: shows a bar on stderr where that is a terminal.
        thresholds: magnitudes for which each column's exceeding rows are counted; the first is the
            default of `CalibrationStats.outlier_columns`.
        kinds: what to collect: `"channels"` (always: magnitudes of each input channel), `"gram"` (the
            second moment XᵀX, 12 bytes for each of K x K entries while it runs) and `"sample"` (up to
            512 rows of each input, the same for every split into batches).

    Raises:
        OptionError: `limit`, a threshold, a kind or the type of a batch is not valid.
        MixqError: the model has no linear, is on the meta device, ran no linear, or some linear saw
            nothing but NaN and infinities; `batches` is empty; or there is no memory for the kinds.

    Warns:
        UserWarning: some linears never ran, or some rows were not finite.
    """
    limit, thresholds = _checked_options(limit, thresholds)
    kinds = checked_kinds(kinds)
    linears = _linears(model)
    device = _device(model)
    check_memory([(in_features(module), module.get_parameter("weight").device) for module in linears], kinds)
    inputs = SharedInputs(lambda channels, where: InputAccumulator(channels, kinds, thresholds, where))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_without_fast_attention())
        for module in linears:
            hook = _hook(inputs, in_features(module))
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        count = 0
        for batch in _with_progress(itertools.islice(batches, limit), _total(batches, limit), progress):
            _run(model, batch, device)
            inputs.settle()
            count += 1
    if count == 0:
        raise MixqError(
            "calibration got no batches: `batches` is empty, or it is a generator that was already used up."
        )
    return _statistics(model, linears, inputs, thresholds)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name to (N, K) of every linear that `calibrate` observes, for `CalibrationStats.check_model`.

    Raises MixqError where there is none.
    """
    return {
        name: (_out_features(module), in_features(module))
        for module, names in _linears(model).items()
        for name in names
    }


def in_features(module: nn.Module) -> int:
    """K, the number of input channels, of an `nn.Linear` or a `Conv1D` (whose weight is `[K, N]`)."""
    weight: Tensor = module.get_parameter("weight")
    return weight.shape[0] if is_conv1d(module) else weight.shape[1]


def _out_features(module: nn.Module) -> int:
    weight: Tensor = module.get_parameter("weight")
    return weight.shape[1] if is_conv1d(module) else weight.shape[0]


def _is_linear(module: nn.Module) -> bool:
    return is_plain_linear(module) or is_conv1d(module)


def _linears(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear with all its names; raises where there is none or a weight is on the meta device."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"calibrate needs an nn.Module, not {type(model).__name__}.")
    linears: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear(module):
            names = linears.setdefault(module, [])
            plain_name = normalise_fqn(name)
            if plain_name not in names:
                names.append(plain_name)
    if not linears:
        raise MixqError(
            f"{type(model).__name__} has no nn.Linear and no transformers Conv1D, so there is nothing to "
            "calibrate. Subclasses of nn.Linear (already quantized layers, for example) are not observed: "
            "calibrate the original model."
        )
    return linears


def _device(model: nn.Module) -> torch.device:
    device = torch.device("cpu")
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.is_meta:
            raise MixqError(
                f"{type(model).__name__} cannot be calibrated: its parameter {name!r} is on the meta device "
                "and has no values. Load the weights first, for example with from_pretrained(...) and "
                "without device='meta'."
            )
        if place == 0:
            device = parameter.device
    return device


def _checked_options(limit: int | None, thresholds: Sequence[float]) -> tuple[int | None, tuple[float, ...]]:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise OptionError(f"limit must be a positive number of batches or None, not {limit!r}.")
    values = tuple(float(value) for value in thresholds)
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise OptionError(f"thresholds must be one or more finite numbers above 0, not {thresholds!r}.")
    return limit, values


def _hook(
    inputs: SharedInputs, channels: int
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        activation = args[0] if args else next(iter(kwargs.values()))
        values = nested_rows(activation) if activation.is_nested else activation
        if values.shape[-1] != channels:
            return  # The linear is about to raise the error that names the shapes.
        rows = values.detach().reshape(-1, channels)
        if rows.shape[0] > 0:
            inputs.add(module, activation, rows)

    return observe


def _run(model: nn.Module, batch: Any, device: torch.device) -> None:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        batch = moved(batch)
    elif isinstance(batch, Mapping):
        batch = {name: moved(value) for name, value in batch.items()}
    elif isinstance(batch, (tuple, list)):
        batch = [moved(value) for value in batch]
    else:
        raise OptionError(
            f"a calibration batch must be a tensor, a mapping or a tuple, not {type(batch).__name__}. "
            "Tokenize text first: tokenizer(text, return_tensors='pt')."
        )
    args, kwargs = arguments_of(model, batch)
    model(*args, **kwargs)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Flags are kept per module: model.train(True) would also set parts that were frozen in eval mode.
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _without_fast_attention() -> Iterator[None]:
    # The fast path of nn.TransformerEncoder reads the weights of its linears and calls none of them.
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _total(batches: Iterable[Any], limit: int | None) -> int | None:
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:
        return limit
    return length if limit is None else min(length, limit)


def _with_progress(batches: Iterable[Any], total: int | None, progress: bool) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    return track(batches, "Calibrating", total=total, console=console, transient=True, disable=hidden)


def _statistics(
    model: nn.Module,
    linears: dict[nn.Module, list[str]],
    inputs: SharedInputs,
    thresholds: tuple[float, ...],
) -> CalibrationStats:
    found: dict[str, LinearStatistics] = {}
    for accumulator, readers in inputs.take_out():
        found.update(accumulator.statistics([name for module in readers for name in linears[module]]))
    names = [name for names in linears.values() for name in names]
    seen = {name: found[name] for name in names if name in found}
    never_run = [name for name in names if name not in found]
    _check_seen(model, seen, never_run)
    first = next(model.parameters())
    return CalibrationStats(
        linears=seen,
        never_run=tuple(never_run),
        thresholds=thresholds,
        model_class=_model_class(model),
        dtype=str(first.dtype).removeprefix("torch."),
        package_version=__version__,
    )


def _check_seen(model: nn.Module, seen: dict[str, LinearStatistics], never_run: list[str]) -> None:
    if not seen:
        raise MixqError(
            f"none of the {len(never_run)} linears of {_model_class(model)} ran during calibration. The "
            "model calls none of them as modules with at least one row: check that the batches are not empty."
        )
    hopeless = [name for name, entry in seen.items() if entry.rows == 0]
    if hopeless:
        raise MixqError(
            f"every row that reached {_some(hopeless)} during calibration held a NaN or an infinity, so "
            "there is nothing to learn from. A float16 model that overflows does this: calibrate it in "
            "bfloat16 or float32."
        )
    infinite = {
        name: kind for name, entry in seen.items() for kind, value in entry.further.items()
        if not value.isfinite().all()
    }  # fmt: skip
    if infinite:
        raise MixqError(
            f"the {' and '.join(sorted(set(infinite.values())))} of {_some(list(infinite))} overflows "
            "float32, in which it is kept: the activations there are finite and far too large. Calibrate "
            'with kinds=("channels",) only, or look for the layer whose output explodes.'
        )
    if never_run:
        warnings.warn(
            f"{_some(never_run)} never ran during calibration and have no statistics: no batch reached them, "
            "or the model reads their weights without calling them.",
            UserWarning,
            stacklevel=4,
        )
    damaged = [name for name, entry in seen.items() if entry.nonfinite_rows]
    if damaged:
        warnings.warn(
            f"rows with NaN or infinity reached {_some(damaged)} during calibration and were left out; "
            "`nonfinite_rows` counts them.",
            UserWarning,
            stacklevel=4,
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    rest = len(names) - NAMES_SHOWN
    return f"{shown} and {rest} more linears" if rest > 0 else shown


def _model_class(model: nn.Module) -> str:
    inner = getattr(model, "_orig_mod", model)
    return f"{type(inner).__module__}.{type(inner).__qualname__}"
