"""`MixqLinear`: a linear that holds integer codes in place of its 16-bit weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile import ops
from mixq_compile.errors import OperandError
from mixq_compile.ir.nested_rows import map_nested_rows
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.linear_recipe import CACHE_FIELDS, ORIGINAL, LinearRecipe
from mixq_compile.ops.outlier_state import STATE_FIELDS, OutlierState
from mixq_compile.ops.registration import without_gradient
from mixq_compile.ops.weight_codes import aligned
from mixq_compile.runtime.freed_weight import FreedWeight, freed_error
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights import recipe as recipes
from mixq_compile.weights.quantized_weight import QuantizedWeight
from mixq_compile.weights.recipe import InputStatistics

TRIPWIRE = "weight"
"""In every saved state of a MixqLinear: NaN of shape [1] under the name of the 16-bit weight.

Whoever loads the state into an ordinary model meets a wrong shape, in place of a linear that stays random.
"""
STAYS_FP32 = ("weight_scale", "column_max", "effective_threshold")
"""What stays fp32 when the module is cast to another dtype."""
ASSIGNED = "a weight was assigned, which the codes would not follow"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the result of a linear; None where it is off or leaves this one alone."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class MixqLinear(nn.Module):
    """A quantized linear `[..., K] -> [..., N]`, in eager mode as in compiled graphs.

    Its 16-bit weight is gone; `weight` has its shape, dtype and device for code that reads those, and
    raises ReleasedWeightError for code that would compute with it. The parts of its quantized weight are
    parameters, so that what shards or offloads parameters finds them; the outlier state is in buffers.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    index: Tensor
    column_slot: Tensor
    column_max: Tensor
    counters: Tensor
    effective_threshold: Tensor
    cached_index: Tensor
    outlier_weight: Tensor
    outlier_source: Tensor
    weight_marker: Tensor
    held = False
    """True while `hold_states` lasts."""
    was_trainable = False
    """Whether the weight had a gradient before the swap: a backward pass then says that there is none."""
    transposed = False
    """True where it stands for a transformers `Conv1D`, whose weight is [K, N]."""
    tripped = True
    """False while a loader that knows the class asks for the names of what it loads."""

    # What is made in inference mode cannot be written outside of it, and calls write the outlier state.
    @torch.inference_mode(False)
    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        batch_invariant: bool = False,
    ) -> None:
        """An empty quantized linear; `from_linear` fills one from a trained linear."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._scheme = scheme
        self.calibrated: tuple[tuple[int, float], ...] = ()
        policy = scheme.outliers
        self.recipe = LinearRecipe.of(scheme, batch_invariant)
        # Kept, because Dynamo would trace their making in every call.
        self._recipe_text, self._weight_operands = str(self.recipe), self.recipe.weight_operands
        capacity = policy.capacity_for(in_features) if policy else 0
        # First, because a model's dtype is asked of its first floating-point parameter.
        self._hold("outlier_weight", torch.zeros(out_features, capacity, dtype=dtype, device=device))
        if bias:
            self._hold("bias", torch.zeros(out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        for name, tensor in (
            recipes.empty(scheme.recipe, out_features, in_features, dtype, device).named().items()
        ):
            self._hold(name, tensor.zero_() if name != "weight_scale" else tensor.fill_(1))
        state = OutlierState.create(
            in_features, capacity, policy.threshold if policy else float("inf"), device
        )
        for name, buffer in zip(STATE_FIELDS, state.buffers(), strict=True):
            self.register_buffer(name, buffer)
        self.register_buffer(
            "cached_index",
            torch.full((capacity,), -1, dtype=torch.int32, device=device),
        )
        self.register_buffer("outlier_source", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_buffer(
            "weight_marker", torch.full((), torch.nan, dtype=dtype, device=device), persistent=False
        )
        self._place_weight("")

    def _hold(self, name: str, tensor: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @classmethod
    @torch.inference_mode(False)
    def from_linear(
        cls,
        linear: nn.Module,
        scheme: QuantScheme,
        *,
        columns: Sequence[int] | None = None,
        column_max: Sequence[float] | None = None,
        batch_invariant: bool = False,
        keep_original: bool = False,
        statistics: InputStatistics | None = None,
    ) -> MixqLinear:
        """Quantizes a trained `nn.Linear` or `Conv1D` (whose weight is [K, N]).

        `columns` are calibrated outlier columns; their 16-bit weights are kept. `keep_original` keeps
        the whole 16-bit weight as the source of columns found later (twice the memory, smaller error). Both
        come from the codes where the scheme's solver makes columns make up for each other's errors.
        `statistics` are those that the scheme's weights are made with, where it needs any.
        """
        parameter: Tensor = linear.weight  # type: ignore[assignment]
        weight = parameter.detach() if isinstance(linear, nn.Linear) else parameter.detach().t()
        out_features, in_features = weight.shape
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        module = cls(
            in_features, out_features, scheme,
            bias=bias is not None, dtype=weight.dtype, device=weight.device, batch_invariant=batch_invariant,
        )  # fmt: skip
        module.was_trainable = parameter.requires_grad
        made = recipes.make(scheme.recipe, weight, weight.dtype, statistics.tensors if statistics else None)
        for name, tensor in made.named().items():
            module.get_parameter(name).data = tensor
        if not isinstance(linear, nn.Linear):
            module.transposed = True
        if bias is not None and module.bias is not None:
            module.bias.data = bias.detach().clone()
        if keep_original and not recipes.outliers_from_codes(scheme.recipe):
            module.keep_original(weight.contiguous())
        if columns is not None and scheme.outliers is not None:
            state = module.outlier_state()
            state.preload(columns, column_max)
            module.calibrated = state.calibrated
            if scheme.outliers.miss in ("static", "frozen"):
                state.freeze()
            chosen = state.columns()
            from_codes = recipes.outliers_from_codes(scheme.recipe)
            kept = statistics.tensors.get(recipes.KEPT) if statistics is not None else None
            source = made.outlier_columns(scheme.weight, in_features, kept) if from_codes else weight
            module.outlier_weight[:, : len(chosen)] = source[:, chosen]
            module.cached_index[: len(chosen)] = module.index[: len(chosen)]
        return module

    def keep_original(self, weight: Tensor) -> None:
        """Keeps a 16-bit weight `[N, K]` as the source of outlier columns, also in the module's state."""
        self.register_buffer("outlier_source", weight.clone() if weight.is_inference() else weight)

    def outlier_state(self) -> OutlierState:
        """A view of this module's outlier buffers."""
        threshold = self.scheme.outliers.threshold if self.scheme.outliers else float("inf")
        buffers = {name: getattr(self, name) for name in STATE_FIELDS}
        return OutlierState(**buffers, threshold=threshold, calibrated=self.calibrated)

    @property
    def scheme(self) -> QuantScheme:
        """The scheme that the weight was quantized in; fixed, since the forward follows its recipe."""
        return self._scheme

    @property
    def batch_invariant(self) -> bool:
        """Whether one kernel serves every number of rows; fixed when the module is made."""
        return self.recipe.batch_invariant

    @property
    def outlier_weight_source(self) -> str | None:
        """Where the weights of outlier columns come from: `original`, `codes`, `solved` beside the codes by a
        solver that keeps them, or None without slots."""
        policy = self.scheme.outliers
        if policy is None:
            return None
        if recipes.outliers_from_codes(self.scheme.recipe):
            return "solved" if recipes.keeps_columns(self.scheme.recipe, policy.miss) else "codes"
        fixed = bool(self.calibrated) and policy.miss in ("static", "frozen")
        return "original" if fixed or self.outlier_source.numel() else "codes"

    @property
    def weight(self) -> FreedWeight:
        """The weight's shape, dtype and device, without its numbers."""
        return self._freed_weight

    @weight.setter
    def weight(self, value: Any) -> None:
        raise freed_error(self.fqn, ASSIGNED)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As `nn.Module` does; raises ReleasedWeightError for `weight`."""
        if name == "weight":
            raise freed_error(self.fqn, ASSIGNED)
        super().register_parameter(name, param)

    @property
    def fqn(self) -> str:
        """The name in its model that errors tell; empty until a swap or a load sets it."""
        return self._freed_weight.fqn

    @fqn.setter
    def fqn(self, name: str) -> None:
        self._freed_weight.fqn = name

    @torch.inference_mode(False)
    def _align(self) -> None:
        # Copies, pickles and assigned states that were made in inference mode could not be written.
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.is_inference():
                self._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_inference():
                self._buffers[name] = buffer.clone()
        # A copy packs rows densely, where fast kernels want each to begin at a multiple of 16 bytes.
        codes = self.weight_codes.data
        if has_data(codes) and (rows := aligned(codes)) is not codes:
            self.weight_codes.data = rows

    def _place_weight(self, fqn: str) -> None:
        # Kept, not made where it is read: Dynamo cannot trace its making.
        marker = self.weight_marker
        self._freed_weight = FreedWeight(
            (self.out_features, self.in_features), marker.dtype, marker.device, fqn
        )

    def dequantized_weight(self) -> Tensor:
        """The fp32 weight `[N, K]` that the codes stand for."""
        named: dict[str, Tensor] = {name: getattr(self, name) for name in self.scheme.recipe.operands}
        return QuantizedWeight.from_named(named).dequantized(self.scheme.weight, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, outlier weights and state."""
        held = [*self.buffers(), *(each for name, each in self.named_parameters() if name != "bias")]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def forward(self, x: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """The quantized linear, learning outlier columns as the scheme's policy says.

        `row_mask`, bool of x's leading dimensions, is False for rows that pad a batch: they teach nothing.
        Raises OperandError where x does not have `in_features` columns.
        """
        if x.is_nested:
            if row_mask is not None:
                raise OperandError("a nested x has no padding, and takes no row_mask: leave it out.")
            return map_nested_rows(self.forward, x)
        if x.shape[-1:] != (self.in_features,) and not torch.compiler.is_compiling():
            name = f"{self.fqn}, a {self!r}," if self.fqn else f"a {self!r}"
            raise OperandError(
                f"{name} was called with x of shape {list(x.shape)}: its last dimension must be "
                f"{self.in_features}."
            )
        autocast = _autocast_dtype(x)
        result: Tensor = ops.linear(
            x=x if autocast is None else x.to(self.outlier_weight.dtype),
            bias=self.bias,
            weight=[self._part(name) for name in self._weight_operands],
            state=[getattr(self, name) for name in STATE_FIELDS],
            cache=[getattr(self, name) for name in CACHE_FIELDS],
            row_mask=row_mask,
            recipe=self._recipe_text,
        )
        if autocast is not None:
            result = result.to(autocast)
        if self.was_trainable and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return without_gradient(result, self.fqn)
        return result

    def _part(self, operand: str) -> Tensor:
        """What the operator calls by this name; the kept 16-bit weight has another one here."""
        found: Tensor = self.outlier_source if operand == ORIGINAL else getattr(self, operand)
        return found

    def extra_repr(self) -> str:
        """Shape and scheme, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        # Who asks for the variables looks at the module and saves nothing.
        if self.tripped and not keep_vars:
            destination[prefix + TRIPWIRE] = torch.full(
                (1,), torch.nan, dtype=torch.float32, device=self.weight_codes.device
            )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tripwire = state_dict.get(prefix + TRIPWIRE)
        if tripwire is not None and tripwire.numel() != 1:
            error_msgs.append(
                f"{prefix}{TRIPWIRE} is the weight of an ordinary linear, and this one is quantized: load it "
                "before mixq_compile.quantize."
            )
        brings = prefix + "outlier_source" in state_dict
        if prefix + "weight_codes" in state_dict and brings != bool(self.outlier_source.numel()):
            keeps, lacks = ("the saved model", "this one") if brings else ("this model", "the saved one")
            error_msgs.append(
                f"{prefix}outlier_source: keep_originals kept the 16-bit weight in {keeps} and not in "
                f"{lacks}: quantize both in the same way."
            )
        super()._load_from_state_dict(  # type: ignore[no-untyped-call]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._align()
        # Whether a state is held is a matter of the moment, here and where the dict was made.
        state = self.outlier_state()
        state.let_go()
        if self.held:
            state.hold()
        if prefix + TRIPWIRE in unexpected_keys:
            unexpected_keys.remove(prefix + TRIPWIRE)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._align()
        # Of a copy or a pickle: that one made inside `hold_states` has left it.
        if has_data(self.counters):
            self.outlier_state().let_go_if_copied()
            if not self.outlier_state().held:
                self.held = False

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixqLinear:
        # A cast of the model's dtype must not touch scales, codes and state: they only change device. Each
        # is replaced once it is right, so that a move that fails midway leaves a module that still is.
        kept = {id(getattr(self, name)) for name in STAYS_FP32}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept and tensor.is_floating_point():
                return fn(tensor)
            whole = tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
            result = fn(whole)
            if result is whole:
                return tensor
            if result.dtype != whole.dtype:  # `Module.type` casts integers too
                return tensor.to(result.device)
            return result.view(tensor.dtype)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._align()
        self.weight_marker = torch.full_like(self.weight_marker, torch.nan)  # `to_empty` leaves any number
        self._place_weight(self.fqn)
        return self
