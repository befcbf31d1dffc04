"""Writes the directories of the first two schemas, as older releases did."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mixq_compile.runtime.compilation import swapped_linears
from mixq_compile.runtime.mixq_linear import MixqLinear


def save_old(model: Any, directory: Path, schema: int) -> Path:
    """Writes a swapped Llama in this schema."""
    swapped = {name: module for name, module in model.named_modules() if isinstance(module, MixqLinear)}
    linears = {
        name: {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
            "dtype": "float32",
            "scheme": module.scheme.to_json(),
            "batch_invariant": module.batch_invariant,
            "calibrated": module.calibrated,
            "original": module.outlier_source.numel() > 0,
        }
        for name, module in swapped.items()
    }
    manifest: dict[str, Any] = {
        "schema_version": schema,
        "architecture": type(model).__name__,
        "dtype": "float32",
        "linears": linears,
        "left_alone": {
            record.fqn: {
                name: getattr(record, name)
                for name in ("role", "out_features", "in_features", "skip", "float_bytes")
            }
            for record in swapped_linears(model)
            if record.scheme is None
        },
        "computed": {"model.rotary_emb.inv_freq": "float32", "model.rotary_emb.original_inv_freq": "float32"},
    }
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    if schema == 1:
        del manifest["left_alone"]
        for entry in linears.values():
            del entry["original"]
        for name in swapped:
            del tensors[f"{name}.weight"]
    else:
        config.quantization_config = {
            "quant_method": "mixq", "schema_version": schema, "scheme": "w8a8o16", "layers": {},
            "modules_to_not_convert": ["lm_head"],
        }  # fmt: skip
    config.save_pretrained(directory)
    (directory / "mixq.json").write_text(json.dumps(manifest))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
