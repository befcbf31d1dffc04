"""Loads what MODEL names: a Hugging Face directory or hub name, a quantized directory, or module:function."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixq_compile.cli.options import NOT_INSTALLED
from mixq_compile.errors import CheckpointError, MixqError, OptionError, unknown_name

if TYPE_CHECKING:
    import torch

BUILDER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
MANIFEST = "mixq.json"
LANGUAGE_MODEL = re.compile(r"(ForCausalLM|LMHeadModel)$")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, on its device."""

    source: str
    """What the user wrote."""
    model: Any
    tokenizer: Any | None
    no_tokenizer: str = ""
    """Why there is no tokenizer."""
    quantized: bool = False
    """True where it comes from a directory that `mixq quantize` wrote."""
    example: Any = None
    """Inputs that a function gave beside its model: a tensor, a tuple, or a dictionary by name."""

    @property
    def device(self) -> torch.device:
        """Where its first parameter lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> str:
        """The name of its first parameter's dtype."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def config(self) -> Any:
        """Its transformers configuration; None where it has none."""
        return getattr(self.model, "config", None)

    def required_tokenizer(self) -> Any:
        """The tokenizer. Raises MixqError where there is none."""
        if self.tokenizer is None:
            raise MixqError(
                f"{self.source} has no tokenizer ({self.no_tokenizer}), and the text must be turned into "
                "tokens. Put the tokenizer's files beside the model (tokenizer.save_pretrained(DIR)), or let "
                "module:function return (model, tokenizer)."
            )
        return self.tokenizer

    def require_language_model(self) -> None:
        """Raises MixqError unless the model predicts the next token."""
        name = type(self.model).__name__
        predicts = LANGUAGE_MODEL.search(name) or not hasattr(self.config, "architectures")
        if not predicts or getattr(self.config, "is_encoder_decoder", False):
            raise MixqError(
                f"{self.source} is a {name}, which does not predict the next token, so it has no "
                "perplexity. Give a causal language model (…ForCausalLM); `mixq demo --model` compares the "
                "outputs of others."
            )


def is_quantized(folder: Path) -> bool:
    """True for a directory that `mixq quantize` or `save_pretrained` wrote, in any release."""
    if (folder / MANIFEST).is_file():
        return True
    try:
        entry = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        return bool(entry["quant_method"] == "mixq")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def resolve_device(name: str) -> torch.device:
    """The device of this name; `auto` is the GPU where there is one.

    Raises OptionError for a name that means none, MixqError where there is no such GPU.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu)|cuda(?::(\d+))?", name)
    if match is None:
        raise OptionError(f"unknown device {name!r}. Valid: auto, cpu, cuda, cuda:N.")
    if match[1] is None and not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
        )
        raise MixqError(
            f"device {name!r} was asked for, but {built}. Use --device cpu; `mixq doctor` tells more."
        )
    if match[2] is not None and int(match[2]) >= torch.cuda.device_count():
        raise MixqError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs, numbered from 0."
        )
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is float32 on the CPU and bfloat16 on a GPU."""
    import torch

    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def require_unquantized(source: str) -> None:
    """Raises OptionError for a directory that `mixq quantize` wrote, before anything of it is loaded."""
    if (Path(source).expanduser() / MANIFEST).is_file():
        raise OptionError(
            f"{source} is quantized already, and this needs the model in 16 or 32 bit: give the directory or "
            "name that it was made from."
        )


def load_model(source: str, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a model and, where there is one, its tokenizer.

    Raises MixqError (OptionError, CheckpointError) that says what is missing and what to do.
    """
    import torch

    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    # A function that builds a model with random weights builds the same one each time.
    torch.manual_seed(0)
    folder = Path(source).expanduser()
    if BUILDER.fullmatch(source) and not folder.exists():
        return _build(source, target, kind)
    _require_transformers(source)
    if is_quantized(folder):
        if dtype != "auto":
            raise OptionError(
                f"{source} is quantized and keeps the dtype it was quantized in: leave out --dtype."
            )
        from mixq_compile.runtime.checkpoint_loading import load_pretrained

        return _with_tokenizer(source, str(folder), load_pretrained(folder, target), quantized=True)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{source} is a directory without config.json: neither a Hugging Face model nor one that "
                "`mixq quantize` wrote. Give the directory that holds the model's config.json."
            )
        return _with_tokenizer(source, str(folder), _pretrained(source, str(folder), target, kind))
    if folder.exists() or not HUB_NAME.fullmatch(source):
        what = "is a file" if folder.exists() else "does not exist"
        raise OptionError(
            f"{source} {what}. MODEL is a Hugging Face directory or hub name, a directory that "
            "`mixq quantize` wrote, or module:function."
        )
    return _with_tokenizer(source, source, _pretrained(source, source, target, kind))


def _require_transformers(source: str) -> None:
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise MixqError(f"{source} is loaded by transformers, which {NOT_INSTALLED}.") from error
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _pretrained(source: str, place: str, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise MixqError(_not_found(source, place, error)) from error
    names = getattr(config, "architectures", None) or []
    architecture = next((found for name in names if (found := getattr(transformers, name, None))), None)
    if names and architecture is None:
        raise MixqError(
            f"{source} is a {names[0]}, which this transformers ({transformers.__version__}) does not have. "
            "Install a newer one, or load the model in a function of your own: module:function."
        )
    try:
        model = (architecture or transformers.AutoModel).from_pretrained(place, config=config, dtype=dtype)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise MixqError(f"the weights of {source} cannot be loaded: {error}") from error
    return model.eval().to(device)


def _not_found(source: str, place: str, error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    if os.path.isdir(place):
        return f"the configuration of {source} cannot be read: {first_line}"
    return (
        f"no model {source!r}: there is no such directory, and the Hugging Face hub did not give it "
        f"({first_line}). Check the name; offline, give the directory of a model that you downloaded before."
    )


def _with_tokenizer(source: str, place: str, model: Any, *, quantized: bool = False) -> LoadedModel:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return LoadedModel(source, model, None, str(error).strip().split("\n")[0], quantized)
    return LoadedModel(source, model, tokenizer, quantized=quantized)


def _build(source: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Calls the function that `module:function` names; the working directory is searched first."""
    from torch import nn

    module_name, _, function_name = source.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MixqError(
            f"{source}: there is no module {error.name!r}. Run mixq in the folder that holds it, or "
            "install it."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [
            name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
        ]
        raise unknown_name(f"function of the module {module_name}", function_name, public)
    made = function()
    given = made if isinstance(made, tuple) else (made,)
    model, tokenizer, example = (*given, None, None)[:3]
    if not isinstance(model, nn.Module) or len(given) > 3:
        raise OptionError(
            f"{source} returned a {type(made).__name__}: it must return a torch.nn.Module, "
            "(model, tokenizer), or (model, tokenizer, example)."
        )
    why = "" if tokenizer is not None else "the function returned no tokenizer"
    return LoadedModel(source, _moved(model.eval(), device, dtype), tokenizer, why, example=example)


def _moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model on this device and in this dtype; tensors without data cannot be moved, and need not."""
    there = all(
        tensor.device == device and (tensor.dtype == dtype or not tensor.is_floating_point())
        for tensor in (*model.parameters(), *model.buffers())
    )
    return model if there else model.to(device=device, dtype=dtype)
