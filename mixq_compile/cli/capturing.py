"""Captures what MODEL names for inspection: with its weights, or, for a large one, only their shapes."""

from __future__ import annotations

import contextlib
import difflib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.benchmarking.choices import parse_batch
from mixq_compile.benchmarking.shapes import MODELS
from mixq_compile.cli.models import BUILDER, LoadedModel, load_model, resolve_device, resolve_dtype
from mixq_compile.cli.texts import documentation, encode
from mixq_compile.errors import CheckpointError, MixqError, OptionError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

    from mixq_compile.ir.graph import CapturedGraph

EXPORTED = ".pt2"
DEFAULT_BATCH = "8x128"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.safetensors.index.json")
DECODER_TOKENS = 8


@dataclass(frozen=True)
class Captured:
    """A captured model, from which any number of graphs can be made."""

    source: str
    """What the user wrote."""
    program: ExportedProgram
    model: nn.Module | None
    """The model itself; None for an exported program."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """The example that it was captured with."""
    seconds: float
    """Time of the capture, loading not included."""
    has_weights: bool
    """False where only the shapes of the weights are known: such a graph cannot run."""

    def graph(self) -> CapturedGraph:
        """A new graph for passes to rewrite; it shares the program's weights."""
        from mixq_compile import ops  # noqa: F401  # defines torch.ops.mixq
        from mixq_compile.ir.graph import CapturedGraph

        return CapturedGraph.from_export(self.program)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters live; the CPU for one without any."""
        import torch

        tensors = self.model.parameters() if self.model is not None else self.program.parameters()
        first = next(iter(tensors), None)
        return first.device if first is not None else torch.device("cpu")

    @property
    def inputs(self) -> str:
        """The example's tensors in a line, such as `input_ids int64[8, 128]`."""
        from torch import Tensor

        from mixq_compile.ir.verify import describe

        named = [(f"input {place}", value) for place, value in enumerate(self.args)] + [*self.kwargs.items()]
        return ", ".join(f"{name} {describe(value)}" for name, value in named if isinstance(value, Tensor))

    def require_weights(self, what_for: str) -> None:
        """Raises OptionError where the model has no weights; `what_for` ends the first sentence."""
        if not self.has_weights:
            raise OptionError(
                f"{self.source} was captured without its weights, and they are needed {what_for}. Give a "
                "model that has them, and leave out --no-weights."
            )


def capture_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch: str = DEFAULT_BATCH,
    weights: bool = True,
) -> Captured:
    """Loads and exports what the user named.

    `batch` is sequences x tokens of the example. Without `weights`, or where there are none (one of the
    known shapes such as `llama-2-7b`, a directory with just a config.json), shapes alone are captured:
    a model of any size then takes no memory. Raises MixqError that says what is missing.
    """
    path = Path(source).expanduser()
    if path.suffix == EXPORTED:
        return _from_file(source, path)
    if source in MODELS or not weights or _lacks_weights(path):
        return _without_weights(source, path, device, dtype, batch)
    _check_shape_name(source, path)
    loaded = load_model(source, device, dtype)
    example = loaded.example if loaded.example is not None else _example(loaded, batch)
    return _export(source, loaded.model, example, has_weights=True)


def _check_shape_name(source: str, path: Path) -> None:
    """Raises OptionError for what looks like a misspelt known shape."""
    near = difflib.get_close_matches(source.lower(), MODELS, n=1, cutoff=0.75)
    if near and "/" not in source and not path.exists():
        raise OptionError(
            f"no model {source!r}. Did you mean {near[0]!r}? Known shapes, which need no weights: "
            f"{', '.join(MODELS)}. Anything else is a Hugging Face directory or hub name, or module:function."
        )


def _lacks_weights(path: Path) -> bool:
    if not (path / "config.json").is_file():
        return False
    return not any(found for pattern in WEIGHT_FILES for found in path.glob(pattern))


def _export(source: str, model: nn.Module, example: Any, *, has_weights: bool) -> Captured:
    from torch import Tensor

    from mixq_compile.runtime.export import capture

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example)
    begin = time.perf_counter()
    try:
        program = capture(model, kwargs or args)
    except MixqError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MixqError(
            f"torch.export cannot capture {source}: {first_line} "
            "A model that only torch.compile can capture is inspected while it runs: "
            'torch.compile(model, backend="mixq", options={"report": "report.html"}).'
        ) from error
    return Captured(source, program, model, args, kwargs, time.perf_counter() - begin, has_weights)


def _from_file(source: str, path: Path) -> Captured:
    from mixq_compile.runtime.program_files import load

    if not path.is_file():
        raise OptionError(f"{source} does not exist. An exported program is written by mixq_compile.save.")
    begin = time.perf_counter()
    try:
        program = load(path)
    except CheckpointError as error:
        raise OptionError(str(error)) from error
    args, kwargs = program.example_inputs or ((), {})
    return Captured(source, program, None, tuple(args), dict(kwargs), time.perf_counter() - begin, True)


def _without_weights(source: str, path: Path, device: str, dtype: str, batch: str) -> Captured:
    """Captures a model whose parameters are fake tensors: shapes and dtypes without memory."""
    import torch

    from mixq_compile.ir.without_data import shapes_only

    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    with shapes_only():
        if BUILDER.fullmatch(source) and not path.exists():
            with torch.device(target), _default_dtype(kind):
                loaded = load_model(source, device, dtype)
            model, example = loaded.model, loaded.example
        else:
            with torch.device(target), _default_dtype(kind):
                model, example = _from_configuration(source).eval(), None
        if example is None:
            made = _example(LoadedModel(source, model, None), batch)
            example = {
                name: torch.empty_like(value) if isinstance(value, torch.Tensor) else value
                for name, value in made.items()
            }
    return _export(source, model, example, has_weights=False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Lets modules be built in a dtype: tensors without data cannot be cast afterwards."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _from_configuration(source: str) -> nn.Module:
    """A model with the weights that its configuration implies, built on the current device or mode."""
    try:
        import transformers
    except ImportError as error:
        raise MixqError(
            f"{source} is built by transformers, which is not installed: pip install 'mixq-compile[demo]'"
        ) from error
    if source in MODELS:
        shape = MODELS[source]
        config = shape.config(shape.layers, positions=4096)
        return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{source} is no model whose configuration can be read: {str(error).splitlines()[0]} "
            f"Without weights, MODEL is a directory with a config.json, a hub name, module:function, or one "
            f"of {', '.join(MODELS)}."
        ) from error
    names = getattr(config, "architectures", None) or []
    kind = next((found for name in names if (found := getattr(transformers, name, None))), None)
    if kind is not None:
        return kind(config)  # type: ignore[no-any-return]
    return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]


def _example(loaded: LoadedModel, batch: str) -> dict[str, Any]:
    """Inputs for a transformers model: documentation of Python's library as text, or a random image."""
    import torch

    config = loaded.config
    if config is None:
        raise MixqError(
            f"{loaded.source} is not a transformers model, so that its inputs are not known: let "
            "module:function return (model, tokenizer, example), where tokenizer may be None and example is "
            "a tensor, a tuple of positional arguments or a dictionary of named ones."
        )
    sequences, tokens = parse_batch(batch)
    if getattr(loaded.model, "main_input_name", "input_ids") == "pixel_values":
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        images = torch.randn(
            sequences, channels, height, width,
            dtype=torch.float32, device="cpu", generator=torch.Generator("cpu").manual_seed(0),
        )  # fmt: skip
        return {"pixel_values": images.to(loaded.device, next(loaded.model.parameters()).dtype)}
    tokens = min(tokens, int(getattr(config, "max_position_embeddings", 0) or tokens))
    texts = documentation(sequences, words=tokens)
    encoded = encode(texts, loaded.tokenizer, tokens, config.vocab_size)
    inputs: dict[str, Any] = {"input_ids": encoded["input_ids"].to(loaded.device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :DECODER_TOKENS].contiguous()
    if getattr(config, "use_cache", False):
        inputs["use_cache"] = False
    return inputs
