"""What quantizing on the fly costs in memory, said before it is spent."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from mixq_compile.errors import MixqError
from mixq_compile.ir.free_memory import free_bytes
from mixq_compile.scheme import QuantScheme
from mixq_compile.weights import recipe as recipes

log = logging.getLogger(__name__)

WORTH_SAYING = 1 << 30
"""Bytes of 16-bit weights from which the one message about both copies is a warning."""
RESERVE = 0.05
"""Part of the free memory that packing must leave."""

REMEDIES = (
    "mixq_compile.quantize(model) swaps the linears before compiling and frees their 16-bit weights, and "
    "options={'release_weights': True} frees them after compiling"
)


def check(weights: Sequence[tuple[Tensor, QuantScheme]], keeps_originals: bool) -> None:
    """Says what packing these weights keeps in memory; raises MixqError where it does not fit."""
    held = sum(weight.nbytes for weight, _ in weights)
    needed = sum(packed_bytes(weight, scheme) for weight, scheme in weights)
    device = weights[0][0].device
    available = free_bytes(device)
    if available is not None and needed > available * (1 - RESERVE):
        raise MixqError(
            f"packing {len(weights)} weights needs {needed / 2**30:.2f} GiB beside the "
            f"{held / 2**30:.2f} GiB they have, and {device} has {available / 2**30:.2f} GiB free. "
            f"{REMEDIES}."
        )
    if keeps_originals:
        log.log(
            logging.WARNING if held >= WORTH_SAYING else logging.INFO,
            "the model keeps its weights (%.2f GiB) beside the packed ones (%.2f GiB): %.2f times the "
            "memory. %s.",
            held / 2**30, needed / 2**30, 1 + needed / held, REMEDIES,
        )  # fmt: skip


def packed_bytes(weight: Tensor, scheme: QuantScheme) -> int:
    """Bytes of what packing a weight `[N, K]` keeps.

    Of a weight `[K, N]` the codes are as many; scales and outlier columns, few beside them, about as many.
    """
    out_features, in_features = weight.shape
    slots = scheme.outliers.capacity_for(in_features) if scheme.outliers is not None else 0
    return recipes.packed_bytes(scheme.recipe, out_features, in_features, weight.dtype, slots)
