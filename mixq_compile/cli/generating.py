"""The models that `mixq bench generate` measures: by configuration, or loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.benchmarking.shapes import MODELS, find_model
from mixq_compile.cli.models import BUILDER, is_quantized, load_model
from mixq_compile.errors import OptionError, unknown_name

if TYPE_CHECKING:
    import torch

    from mixq_compile.benchmarking.generating_results import GenerateOptions


def loader(options: GenerateOptions, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """Makes the unquantized model anew at each call.

    Raises OptionError, before anything is built, where MODEL names nothing or the options do not fit it.
    """
    source = options.model
    if source in MODELS:
        shape = find_model(source)
        layers = options.layers or shape.layers
        if layers > shape.layers:
            raise OptionError(f"{source} has 1 to {shape.layers} layers, not {layers}.")

        def build() -> Any:
            from mixq_compile.benchmarking.decoders import build_decoder

            return build_decoder(shape, layers, options.positions, dtype, device)

        return build
    folder = Path(source).expanduser()
    if not folder.exists() and not BUILDER.fullmatch(source) and "/" not in source:
        raise unknown_name("model (and there is no such directory)", source, MODELS)
    if is_quantized(folder):
        raise OptionError(
            f"{source} is quantized: give the directory of the model in 16 bit, which is measured beside "
            "its schemes."
        )
    if options.layers is not None:
        raise OptionError(f"--layers is for a configuration ({', '.join(MODELS)}): {source} has its own.")

    def load() -> Any:
        model = load_model(source, str(device), str(dtype).removeprefix("torch.")).model
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if context is not None and options.positions > context:
            raise OptionError(
                f"{source} reaches {context} tokens, and {options.prompt} + {options.new} were asked for: "
                "give a smaller --prompt or --new."
            )
        return model

    return load
