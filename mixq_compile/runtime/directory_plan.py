"""Which tensors of a directory are quantized: decided on its model without data, as `quantize` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixq_compile.checkpoints import directory as directories
from mixq_compile.checkpoints.file_plan import PlannedLinear, Step
from mixq_compile.checkpoints.safetensors_files import TensorEntry
from mixq_compile.checkpoints.schema import LeftAlone, StoredLinear, StoredQuantization
from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.ops.outlier_state import OutlierState
from mixq_compile.runtime.compilation import LinearRecord
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.quantize import calibration_facts
from mixq_compile.runtime.swap_decisions import Decision, decide, record_of, records_of_experts
from mixq_compile.selection.columns import calibrated_columns
from mixq_compile.selection.eligibility import FLOATS
from mixq_compile.selection.statistics import input_statistics

FUSED = "transformers makes its weight of several tensors, or of a part of one, when it loads the files"
UNKNOWN_NAME = "transformers would not find its codes under the name of its weight"


@dataclass(frozen=True)
class DirectoryPlan:
    """What a quantized directory is made of."""

    source: Path
    config: Mapping[str, Any]
    """The source's config.json."""
    architecture: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    quantization: StoredQuantization = field(repr=False)
    """What it says, but for digest and hashes."""

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(entry.nbytes for entry in self.tensors.values())


def plan_directory(source: Path, options: MixqOptions, device: torch.device) -> DirectoryPlan:
    """Reads the config and the headers of a 16- or 32-bit directory, and decides.

    `device` is where the model will run. Raises CheckpointError where files are missing, corrupt or of
    another model, OptionError where the model is quantized already or not one of transformers'.
    """
    config = directories.read_json(source / directories.CONFIG)
    if "quantization_config" in config:
        method = dict(config["quantization_config"] or {}).get("quant_method")
        raise OptionError(
            f"{source} is quantized already ({method}): give the directory of the original model."
        )
    files = directories.tensor_files(source)
    tensors = directories.checked_tensors(source)
    model, architecture = _empty_model(source, config)
    _cast(model, tensors)
    decisions = decide(model, options, device)
    names = _Names(model, tensors)
    steps: dict[str, Step] = {}
    linears: dict[str, StoredLinear] = {}
    left_alone: dict[str, LeftAlone] = {}
    for decision in decisions:
        step, why = _step(decision, names, model, options)
        if step is None:
            left_alone[decision.fqn] = _left_alone(record_of(decision), why)
            continue
        assert step.linear is not None
        steps[step.source.name] = step
        linears[decision.fqn] = step.linear.stored
    for record in records_of_experts(model):
        left_alone[record.fqn] = _left_alone(record, record.skip or "")
    ordered = tuple(steps.get(name, Step(entry)) for name, entry in tensors.items())
    calibration = calibration_facts(options.stats) if options.stats is not None else None
    quantization = StoredQuantization(linears, left_alone, calibration, _dtype(config, tensors))
    return DirectoryPlan(source, config, architecture, tuple(files), tensors, ordered, quantization)


def _left_alone(record: LinearRecord, why: str) -> LeftAlone:
    return LeftAlone(record.role, record.out_features, record.in_features, why, record.float_bytes)


def _empty_model(source: Path, config: Mapping[str, Any]) -> tuple[Any, str]:
    """The model of a config without data, and the name of its class."""
    import transformers

    try:
        made = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{source / directories.CONFIG} cannot be used: {first_line}") from error
    names = config.get("architectures") or [None]
    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None or not hasattr(architecture, "_from_config"):
        raise OptionError(
            f"{source} is a {names[0]}, which this transformers ({transformers.__version__}) does not have: "
            "install a newer one, or load the model yourself, call mixq_compile.quantize(model) and "
            "mixq_compile.save_pretrained(model, DIR)."
        )
    with torch.device("meta"):
        model = architecture._from_config(made)
    return model.eval(), str(names[0])


def _cast(model: Any, tensors: Mapping[str, TensorEntry]) -> None:
    """Gives the model without data the dtype that most of its files' numbers have."""
    counts: dict[torch.dtype, int] = {}
    for entry in tensors.values():
        if entry.dtype in ("F32", "F16", "BF16"):
            counts[entry.torch_dtype] = counts.get(entry.torch_dtype, 0) + entry.nbytes
    if counts:
        model.to(max(counts, key=lambda dtype: counts[dtype]))


def _dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str:
    """The dtype that transformers loads a directory in by itself."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if isinstance(getattr(torch, named, None), torch.dtype):
        return named
    first = next((entry for entry in tensors.values() if entry.dtype in ("F32", "F16", "BF16")), None)
    return str(first.torch_dtype).removeprefix("torch.") if first is not None else "float32"


class _Names:
    """Which tensor of the files each weight of a model is read from, as transformers' loader finds it."""

    def __init__(self, model: Any, tensors: Mapping[str, TensorEntry]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.tensors = tensors
        conversions = get_model_conversion_mapping(model)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = dict(model.state_dict())
        self.sources: dict[str, list[str]] = {}
        """Of each parameter, the names in files that become it as they are."""
        self.converted = False
        """Whether some tensors become others."""
        for key in tensors:
            renamed, pattern = self._renamed(key)
            if pattern is None:
                self.sources.setdefault(renamed, []).append(key)
            else:
                self.converted = True

    def _renamed(self, key: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        if renamed not in self._state and key in self._state:
            return key, None
        return renamed, pattern

    def keeps(self, key: str, fqn: str, leaves: Mapping[str, Any]) -> bool:
        """Whether the loader finds a quantized linear's tensors under the names that they will have."""
        prefix = key.removesuffix(".weight")
        weight = self._state.pop(f"{fqn}.weight")
        self._state |= {f"{fqn}.{leaf}": weight for leaf in leaves if leaf != "weight"}
        try:
            return all(
                self._renamed(f"{prefix}.{leaf}") == (f"{fqn}.{leaf}", None)
                for leaf in leaves
                if leaf != "weight" and not leaf.startswith(("outlier", "calibrated"))
            )
        finally:
            for leaf in leaves:
                if leaf not in ("weight", "bias"):
                    self._state.pop(f"{fqn}.{leaf}", None)
            self._state[f"{fqn}.weight"] = weight


def _step(decision: Decision, names: _Names, model: Any, options: MixqOptions) -> tuple[Step | None, str]:
    """How a linear is quantized; or None, and why it is left alone."""
    if decision.skip is not None:
        return None, decision.skip
    sources = names.sources.get(f"{decision.fqn}.weight", [])
    if len(sources) != 1:
        if names.converted or sources:
            return None, FUSED
        raise CheckpointError(
            f"the files hold no weight of {decision.fqn!r}: a shard is missing, or they are of another model "
            f"than {directories.CONFIG}. Download the directory again."
        )
    entry = names.tensors[sources[0]]
    shape = decision.shape[::-1] if decision.transposed else decision.shape
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.name!r} in {entry.path} has shape {list(entry.shape)}, and {directories.CONFIG} says "
            f"{list(shape)}: they are of different models. Download the directory again."
        )
    dtype = entry.torch_dtype
    if dtype not in FLOATS:
        return None, f"its weight is {dtype}, not a floating-point type that has kernels"
    linear = _planned(decision, dtype, _has_bias(model, decision.fqn), options)
    if not entry.name.endswith(".weight") or not names.keeps(
        entry.name, decision.fqn, linear.stored.tensors()
    ):
        return None, UNKNOWN_NAME
    return Step(entry, linear), ""


def _has_bias(model: Any, fqn: str) -> bool:
    return getattr(model.get_submodule(fqn), "bias", None) is not None


def _planned(decision: Decision, dtype: torch.dtype, bias: bool, options: MixqOptions) -> PlannedLinear:
    scheme = decision.scheme
    out_features, in_features = decision.shape
    calibrated: tuple[tuple[int, float], ...] = ()
    state: dict[str, float] = {}
    policy = scheme.outliers
    chosen = None
    if options.stats is not None:
        chosen = calibrated_columns(options.stats, decision.fqn, scheme, in_features)
    if chosen is not None and policy is not None:
        made = OutlierState.create(in_features, policy.capacity_for(in_features), policy.threshold, "cpu")
        made.preload(*chosen)
        calibrated = made.calibrated
        state = {"frozen": 1.0} if policy.miss in ("static", "frozen") else {}
    return PlannedLinear(
        StoredLinear(
            scheme=scheme,
            out_features=out_features,
            in_features=in_features,
            bias=bias,
            dtype=str(dtype).removeprefix("torch."),
            batch_invariant=options.batch_invariant,
            columns=len(calibrated),
            calibrated=len(calibrated),
            transposed=decision.transposed,
            state=state,
        ),
        tuple(column for column, _ in calibrated),
        tuple(maximum for _, maximum in calibrated),
        input_statistics(options.stats, decision.fqn, scheme),
    )
