"""Gives a swapped transformers model's own `save_pretrained` and `push_to_hub` a meaning, or an error."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.runtime.checkpoint_saving import save_pretrained
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.stored_model import is_pretrained

TAKEN = ("max_shard_size",)
"""Arguments of transformers' save_pretrained that are taken."""
_AGREEING: dict[str, Any] = {
    "is_main_process": True,
    "push_to_hub": False,
    "safe_serialization": True,
    "state_dict": None,
    "token": None,
    "variant": None,
}
"""Arguments of transformers' save_pretrained, and the value with which it asks for what is done here."""


class SavePretrained:
    """Stands on a swapped model as its `save_pretrained`: writes a quantized directory.

    Transformers' own would write the codes without what it takes to read them. An object and no bound
    method, because those come back from pickle as the class's own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: Any, **options: Any) -> None:
        """Calls `mixq_compile.save_pretrained`. Raises OptionError for an option that it has not."""
        if getattr(self.model, "_hf_peft_config_loaded", False):
            # transformers writes the adapters alone, which are in 16 bit.
            type(self.model).save_pretrained(self.model, save_directory, **options)  # type: ignore[attr-defined]
            return
        taken = {name: options.pop(name) for name in TAKEN if name in options}
        for name, value in options.items():
            if name not in _AGREEING or value != _AGREEING[name]:
                raise OptionError(
                    f"a quantized model's save_pretrained takes no {name}={value!r}: it writes safetensors "
                    "files and config.json, as mixq_compile.save_pretrained does. It takes max_shard_size."
                )
        save_pretrained(self.model, save_directory, **taken)


class PushToHub:
    """Stands on a swapped model as its `push_to_hub`, and refuses."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Raises CheckpointError."""
        raise CheckpointError(
            "a quantized model cannot be pushed to a hub from memory: write it with "
            "mixq_compile.save_pretrained(model, DIR) and upload that directory. Its readers need "
            "import mixq_compile."
        )


def take_over_saving(model: nn.Module) -> None:
    """Makes `save_pretrained` of transformers models with a MixqLinear write a quantized directory."""
    for module in model.modules():
        if is_pretrained(module) and any(isinstance(part, MixqLinear) for part in module.modules()):
            module.__dict__["save_pretrained"] = SavePretrained(module)
            module.__dict__["push_to_hub"] = PushToHub()
