"""Between a MixqLinear and what a directory holds of it: its entry, its tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.checkpoints.schema import (
    CALIBRATED_COLUMNS,
    CALIBRATED_MAXIMA,
    COLUMNS,
    MAXIMA,
    ORIGINAL,
    OUTLIER_WEIGHT,
    StoredLinear,
)
from mixq_compile.errors import CheckpointError
from mixq_compile.ir.without_data import has_data
from mixq_compile.ops.outlier_state import COUNT, FLAG, FROZEN, OVERFLOW, STATE_FIELDS
from mixq_compile.runtime.mixq_linear import TRIPWIRE, MixqLinear
from mixq_compile.thresholds import state_number

_COUNTERS = {"overflow": OVERFLOW, "flag": FLAG, "frozen": FROZEN}
_THRESHOLD = "effective_threshold"


def describe(module: MixqLinear) -> StoredLinear:
    """The entry of a linear as it is now."""
    state = module.outlier_state()
    policy = module.scheme.outliers
    counters = state.counters.tolist()
    number = state_number(policy.threshold if policy else float("inf"))
    fresh = torch.tensor(number, dtype=torch.float32, device="cpu")
    differs = {name: float(counters[place]) for name, place in _COUNTERS.items()}
    differs["frozen"] = float(counters[FROZEN] & 1)  # holding is of the moment
    threshold = float(state.effective_threshold[0])
    if policy is not None and threshold != float(fresh):
        differs[_THRESHOLD] = threshold
    return StoredLinear(
        scheme=module.scheme,
        out_features=module.out_features,
        in_features=module.in_features,
        bias=module.bias is not None,
        dtype=str(module.weight_marker.dtype).removeprefix("torch."),
        batch_invariant=module.batch_invariant,
        columns=int(counters[COUNT]),
        calibrated=len(module.calibrated),
        original=module.outlier_source.numel() > 0,
        transposed=module.transposed,
        state={name: value for name, value in differs.items() if value or name == _THRESHOLD},
    )


def stored_tensors(module: MixqLinear) -> dict[str, Tensor]:
    """The tensors that a directory holds of a linear, by their names in it.

    Raises CheckpointError where the weights of an outlier column are neither here nor can be made, because
    the linear is offloaded.
    """
    found = {name: getattr(module, name) for name in module.scheme.recipe.operands}
    found[TRIPWIRE] = torch.full((1,), torch.nan, dtype=torch.float32, device="cpu")
    if module.bias is not None:
        found["bias"] = module.bias
    if module.outlier_source.numel():
        found[ORIGINAL] = module.outlier_source
    count = int(module.counters[COUNT])
    if count:
        found[COLUMNS] = module.index[:count].clone()
        found[MAXIMA] = module.column_max[:count].clone()
        found[OUTLIER_WEIGHT] = _outlier_weight(module, count)
    if module.calibrated:
        columns, maxima = zip(*module.calibrated, strict=True)
        found[CALIBRATED_COLUMNS] = torch.tensor(columns, dtype=torch.int32, device="cpu")
        found[CALIBRATED_MAXIMA] = torch.tensor(maxima, dtype=torch.float32, device="cpu")
    return {name: tensor.detach() for name, tensor in found.items()}


def _outlier_weight(module: MixqLinear, count: int) -> Tensor:
    """The weights `[N, n]` of the columns in use, also of those that no call has fetched yet."""
    index = module.index[:count]
    weight = module.outlier_weight[:, :count].detach().clone()
    missing = (module.cached_index[:count] != index).nonzero().flatten()
    if len(missing):
        source = module.outlier_source if module.outlier_source.numel() else module.weight_codes
        if not has_data(source):
            raise CheckpointError(
                f"the linear {module.fqn!r} is offloaded, and the weights of outlier columns that it found "
                "are not fetched yet: load the model without offloading, and save that."
            )
        whole = module.outlier_source if module.outlier_source.numel() else module.dequantized_weight()
        weight[:, missing] = whole[:, index[missing].long()].to(weight.dtype)
    return weight


def empty_linear(entry: StoredLinear, dtype: torch.dtype, device: torch.device | str = "cpu") -> MixqLinear:
    """The MixqLinear of an entry, still without weights and state, for activations of this dtype."""
    module = MixqLinear(
        entry.in_features,
        entry.out_features,
        entry.scheme,
        bias=entry.bias,
        dtype=dtype,
        device=device,
        batch_invariant=entry.batch_invariant,
    )
    module.transposed = entry.transposed
    if entry.original:
        module.keep_original(torch.empty(entry.out_features, entry.in_features, dtype=dtype, device=device))
    return module


def set_state(module: MixqLinear, entry: StoredLinear, tensors: Mapping[str, Tensor]) -> None:
    """Makes the outlier state and the weights of its columns anew, whatever the buffers hold.

    `tensors` are those of `StoredLinear.tensors`, or as many of them as belong to outliers. Raises
    CheckpointError for columns that the linear does not have.
    """
    device, dtype = module.counters.device, module.weight_marker.dtype
    count = entry.columns
    columns = tensors[COLUMNS].tolist() if count else []
    maxima = tensors[MAXIMA].tolist() if count else []
    calibrated = tensors[CALIBRATED_COLUMNS].tolist() if entry.calibrated else []
    for chosen in (columns, calibrated):
        if len(set(chosen)) != len(chosen) or any(not 0 <= each < entry.in_features for each in chosen):
            raise CheckpointError(
                f"the outlier columns of {module.fqn!r} are {chosen[:8]}…, which are no columns of "
                f"{entry.in_features}: the file is corrupt. Quantize the model again."
            )
    module.calibrated = tuple(
        zip(calibrated, tensors[CALIBRATED_MAXIMA].tolist() if calibrated else [], strict=True)
    )
    state = module.outlier_state()
    state.renew(list(zip(columns, maxima, strict=True)))
    for name, place in _COUNTERS.items():
        state.counters[place] = int(entry.state.get(name, 0))
    if _THRESHOLD in entry.state:
        state.effective_threshold.fill_(entry.state[_THRESHOLD])
    module.cached_index.fill_(-1)
    module.outlier_weight.detach().zero_()
    if count:
        module.cached_index[:count] = module.index[:count]
        module.outlier_weight.detach()[:, :count] = tensors[OUTLIER_WEIGHT].to(device=device, dtype=dtype)


def ordinary_linear(module: MixqLinear, dtype: torch.dtype) -> nn.Module:
    """The linear that a MixqLinear stands for, with the weight that it computes with.

    That is the original where it is kept; else what the codes stand for, and the 16-bit weights of the
    columns that are known. A transformers `Conv1D` comes back as one.
    """
    if not has_data(module.weight_codes):
        raise CheckpointError(
            f"the linear {module.fqn!r} is offloaded: load the model without offloading before dequantize."
        )
    weight = module.outlier_source if module.outlier_source.numel() else module.dequantized_weight()
    weight = weight.detach().to(dtype)
    count = int(module.counters[COUNT])
    if count and not module.outlier_source.numel():
        weight[:, module.index[:count].long()] = _outlier_weight(module, count).to(dtype)
    made: Any
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        made = Conv1D(1, 1)
        made.nf, made.nx = module.out_features, module.in_features
        made.bias = None
        weight = weight.t().contiguous()
    else:
        made = nn.Linear(1, 1, bias=False, device="meta")
        made.in_features, made.out_features = module.in_features, module.out_features
    made.weight = nn.Parameter(weight, requires_grad=False)
    bias: Any = module.bias
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made.train(module.training)  # type: ignore[no-any-return]


STATE_BUFFERS = (*STATE_FIELDS, "cached_index")
"""What `set_state` makes, beside the weights of outlier columns."""
