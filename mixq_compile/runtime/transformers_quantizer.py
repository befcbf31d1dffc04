"""Loading quantized directories, and quantizing while loading, inside transformers' `from_pretrained`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.checkpoints.safetensors_files import TensorEntry
from mixq_compile.checkpoints.schema import OF_OUTLIERS, StoredQuantization
from mixq_compile.errors import CheckpointError, OptionError
from mixq_compile.ir.without_data import has_data
from mixq_compile.runtime.compilation import remember_calibration, remember_swap
from mixq_compile.runtime.mixq_linear import TRIPWIRE, MixqLinear
from mixq_compile.runtime.options import MixqOptions
from mixq_compile.runtime.quantize import calibration_facts, swap_linear
from mixq_compile.runtime.saving_methods import take_over_saving
from mixq_compile.runtime.stored_linear import STATE_BUFFERS, empty_linear, ordinary_linear, set_state
from mixq_compile.runtime.stored_model import left_alone_records
from mixq_compile.runtime.stored_names import (
    check_fits,
    check_linear,
    check_tensors,
    names_in,
    prefixes,
    put,
)
from mixq_compile.runtime.swap_decisions import Decision, decide, record_of, records_of_experts
from mixq_compile.runtime.swap_record import swap_record
from mixq_compile.runtime.transformers_saving import StateWriter


@functools.cache
def _operation() -> Any:
    """The class of the operation, made when it is first needed: its base is imported after the quantizers."""
    from transformers.core_model_loading import ConversionOps

    class QuantizeWhileLoading(ConversionOps):  # type: ignore[misc]
        """Puts a MixqLinear in the place of a linear as soon as its weight is read, which then dies."""

        def __init__(self, quantizer: MixqHfQuantizer) -> None:
            self.quantizer = quantizer

        def convert(  # type: ignore[override]
            self,
            input_dict: dict[str, Any],
            full_layer_name: str,
            model: Any,
            missing_keys: set[str] | None = None,
            **options: Any,
        ) -> dict[str, Any]:
            """Quantizes one weight; returns nothing, because nothing is left to set."""
            ((_, value),) = input_dict.items()
            weight = value[0] if isinstance(value, list) else value
            self.quantizer.quantize_one(model, full_layer_name.removesuffix(".weight"), weight)
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            return {}

    return QuantizeWhileLoading


class MixqHfQuantizer(StateWriter):
    """What transformers asks about a model of MixqLinears: before, while and after it loads one."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.decided: dict[str, Decision] = {}
        self._names: dict[str, str] = {}
        """Of quantized linears, by the model's name: what the directory's entry calls each."""
        self._prefixes: dict[str, str] = {}
        """By the model's name: what the files call each."""
        self._tensors: dict[str, TensorEntry] = {}
        self._wanted: dict[str, torch.dtype] = {}
        self._model: Any = None
        self._dtype = torch.float32
        self._options: MixqOptions | None = None
        self._quantization: StoredQuantization | None = None
        if self.pre_quantized:
            self._quantization = quantization_config.quantization()
        else:
            self._options = quantization_config.options()

    # Properties that transformers asks for.

    @property
    def is_compileable(self) -> bool:
        """True: the operators are registered with torch."""
        return True

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of an element once it is loaded."""
        if self.param_needs_quantization(model, param_name):
            return self.decided[param_name.removesuffix(".weight")].scheme.weight.bits / 8
        return param.element_size()

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """True for the weight of a linear that is quantized while it is loaded."""
        name, _, leaf = param_name.rpartition(".")
        found = self.decided.get(name)
        return not self.pre_quantized and leaf == "weight" and found is not None and found.skip is None

    def get_quantize_ops(self) -> Any:
        """The operation that quantizes one weight."""
        return _operation()(self)

    # Before loading: the model is on the meta device.

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: Any = None,
        **options: Any,
    ) -> Any:
        self._model = model
        self._dtype = dtype or torch.get_default_dtype()
        if not self.pre_quantized:
            assert self._options is not None
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise OptionError(
                    "quantizing while loading writes nothing to disk, and the device map puts modules there: "
                    "write a quantized directory first (mixq quantize MODEL --output DIR), and load that."
                )
            self.decided = {each.fqn: each for each in decide(model, self._options, torch.device("cpu"))}
            return model
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise CheckpointError(
                "a quantized directory is loaded from its safetensors files, which were not given: call "
                "from_pretrained with the directory, without state_dict."
            )
        self._tensors = check_tensors(files, self.quantization)
        self._place_empty_linears(model)
        return model

    @property
    def quantization(self) -> StoredQuantization:
        """What the directory says of its quantization."""
        assert self._quantization is not None
        return self._quantization

    def _place_empty_linears(self, model: Any) -> None:
        modules = dict(model.named_modules())
        self._names = names_in(modules, model.base_model_prefix, self.quantization.linears)
        if not self._names:
            raise CheckpointError(
                f"none of the {len(self.quantization.linears)} quantized linears of the directory, such as "
                f"{next(iter(self.quantization.linears), '(none)')!r}, is in a {type(model).__name__}: it is "
                "of another architecture. Load it with the class that config.json names."
            )
        ignored = []
        for name, stored_name in self._names.items():
            entry = self.quantization.linears[stored_name]
            ordinary = modules[name]
            check_fits(ordinary, name, entry)
            with torch.device("meta"):
                module = empty_linear(entry, self._dtype, "meta")
            module.fqn = name
            module.tripped = False
            # What is made from the columns is in no file: it must be neither missed nor offloaded.
            module._non_persistent_buffers_set.update(STATE_BUFFERS)
            del module.outlier_weight
            module.register_buffer(
                "outlier_weight",
                torch.empty(entry.out_features, module.index.shape[0], dtype=self._dtype, device="meta"),
                persistent=False,
            )
            module._is_hf_initialized = True  # type: ignore[assignment]
            put(model, ordinary, module)
            ignored.append(re.escape(stored_name))
        unexpected = [TRIPWIRE, *OF_OUTLIERS]
        pattern = rf"(^|\.)({'|'.join(ignored)})\.({'|'.join(unexpected)})$"
        stripped = rf"^({'|'.join(map(re.escape, self._names))})\.({'|'.join(unexpected)})$"
        known = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = known | {pattern, stripped}
        self._keep_dtypes(model)
        self._wanted = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _keep_dtypes(self, model: Any) -> None:
        """Tensors that had another dtype than the model when it was saved have it again."""
        for module, leaf, dtype in self._of_other_dtypes(model):
            tensor = getattr(module, leaf, None)
            if isinstance(tensor, nn.Parameter) and not isinstance(module, MixqLinear):
                tensor.data = tensor.data.to(dtype)

    def _of_other_dtypes(self, model: Any) -> Iterator[tuple[nn.Module, str, torch.dtype]]:
        """Module, name and dtype of what was saved in another dtype; none where the model is cast."""
        if self._dtype != getattr(torch, self.quantization.dtype):
            return
        for name, dtype in self.quantization.dtypes.items():
            owner, _, leaf = name.rpartition(".")
            try:
                module = model.get_submodule(owner)
            except AttributeError:
                continue
            yield module, leaf, getattr(torch, dtype)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Changes nothing: reads how the files' names become the model's, and checks that all is there."""
        if self.pre_quantized and self._model is not None and self._names:
            self._prefixes = prefixes(self._model, self._tensors, weight_conversions, self._names)
            for name, stored_name in self._names.items():
                check_linear(
                    name, self._prefixes.get(name), self.quantization.linears[stored_name], self._tensors
                )
        return weight_conversions

    # While and after loading.

    def quantize_one(self, model: Any, name: str, weight: Tensor) -> None:
        """Puts the MixqLinear of a weight `[N, K]`, or of a `Conv1D`'s, in the place of its linear."""
        assert self._options is not None
        linear = model.get_submodule(name)
        distributed = type(linear.weight).__name__ == "DTensor" or type(weight).__name__ == "DTensor"
        if distributed or tuple(weight.shape) != tuple(linear.weight.shape):
            why = "is sharded over several devices" if distributed else f"has shape {list(weight.shape)}"
            raise CheckpointError(
                f"the weight of {name!r} {why}, and cannot be quantized while it is loaded: write a "
                "quantized directory first (mixq quantize MODEL --output DIR)."
            )
        bias = linear.bias
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None
        swapped = swap_linear(model, name, self.decided[name].scheme, self._options, keep_original=False)
        # The bias comes later, and may be there already.
        swapped.register_parameter("bias", bias)
        for tensor in (*swapped.parameters(), *swapped.buffers()):
            if tensor is not bias:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        swapped._is_hf_initialized = bias is None  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, MixqLinear)}
        calibration = None
        if self.pre_quantized:
            for name, module in linears.items():
                if name in self._names:
                    self._finish(module, name)
            self._cast_computed(model)
            self._cast_renamed(model)
            others = left_alone_records(self.quantization)
            calibration = self.quantization.calibration
        else:
            assert self._options is not None
            self._check_all_quantized(linears)
            for module in linears.values():
                self._freshen(module)
            skipped = [record_of(each) for each in self.decided.values() if each.skip is not None]
            others = [*skipped, *records_of_experts(model)]
            if self._options.stats is not None:
                calibration = calibration_facts(self._options.stats)
        records = [*(swap_record(name, each) for name, each in linears.items()), *others]
        places = {name: place for place, (name, _) in enumerate(model.named_modules())}
        remember_swap(model, sorted(records, key=lambda each: places.get(each.fqn, len(places))))
        remember_calibration(model, calibration)
        take_over_saving(model)
        self._model = None
        self._tensors = {}
        return model

    def _check_all_quantized(self, linears: Mapping[str, MixqLinear]) -> None:
        wanted = {name for name, decision in self.decided.items() if decision.skip is None}
        if missed := sorted(wanted - set(linears)):
            raise CheckpointError(
                f"{missed[0]!r} was not quantized, because no file held its weight, or several did: load the "
                "model without quantization_config, and call mixq_compile.quantize(model)."
            )

    def _freshen(self, module: MixqLinear) -> None:
        # transformers replaces buffers that are not saved by uninitialised memory.
        module.weight_marker.fill_(torch.nan)
        kept = module.outlier_source.numel() > 0
        if not kept:
            module.outlier_source = module.outlier_source.new_empty(0)
        module._place_weight(module.fqn)

    def _finish(self, module: MixqLinear, name: str) -> None:
        """Makes what no file holds: the outlier state, the weights of its columns, the marker."""
        entry = self.quantization.linears[self._names[name]]
        prefix = self._prefixes[name]
        tensors = {
            leaf: self._tensors[f"{prefix}.{leaf}"].read() for leaf in entry.tensors() if leaf in OF_OUTLIERS
        }
        module._non_persistent_buffers_set.difference_update(STATE_BUFFERS)
        set_state(module, entry, tensors)
        offloaded = bool(getattr(getattr(module, "_hf_hook", None), "offload", False))
        if offloaded:
            # A parameter would be read anew in every call, and forget the columns learned since.
            module._non_persistent_buffers_set.discard("outlier_weight")
        else:
            outlier_weight = module._buffers.pop("outlier_weight")
            assert outlier_weight is not None
            module._non_persistent_buffers_set.discard("outlier_weight")
            module.register_parameter("outlier_weight", nn.Parameter(outlier_weight, requires_grad=False))
        for parameter in module.parameters():
            if parameter is not module.bias:
                parameter.requires_grad_(False)
        module._align()
        self._freshen(module)
        module.tripped = True

    def _cast_computed(self, model: Any) -> None:
        for module, leaf, dtype in self._of_other_dtypes(model):
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                module._buffers[leaf] = buffer.to(dtype)

    def _cast_renamed(self, model: Any) -> None:
        """Some releases of transformers leave tensors that they rename in the dtype of the file."""
        for name, parameter in model.named_parameters():
            dtype = self._wanted.get(name, parameter.dtype)
            if parameter.dtype != dtype and has_data(parameter):
                parameter.data = parameter.data.to(dtype)
        self._wanted = {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in list(model.modules()):
            if isinstance(module, MixqLinear):
                put(model, module, ordinary_linear(module, dtype or module.weight_marker.dtype))
        for module in model.modules():
            for method in ("save_pretrained", "push_to_hub"):
                module.__dict__.pop(method, None)
        remember_swap(model, ())
        return model
