"""Whether a provider computes a linear, and whether it is faster for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixq_compile.ops import providers
from mixq_compile.ops.providers import KernelQuery
from mixq_compile.ops.weight_codes import told_by_codes
from mixq_compile.scheme import QuantScheme

LARGE_BATCH = 256
"""From this many rows on an integer product can win where it wins at all."""


def no_kernel(x: Tensor, out_features: int, in_features: int, scheme: QuantScheme) -> str | None:
    """Why nothing computes a linear `[N, K]` of this scheme on x's device and dtype; None where it can be."""
    if scheme.outliers is not None and not told_by_codes(scheme.weight):
        return f"no kernel fetches outlier columns beside {scheme.weight} weights, only beside int8 and int4"
    queries = [providers.linear_query(x, out_features, in_features, scheme.weight, scheme.activation)]
    if scheme.activation is not None:
        op = "quantize" if scheme.activation.signed else "quantize_affine"
        queries.insert(0, KernelQuery(op, x.device, x.dtype, activation=scheme.activation))
    for query in queries:
        chosen, refused = providers.rejections(query)
        if chosen is None:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            return f"no kernel on {query.device.type}: {reasons}"
    return None


def not_faster(query: providers.KernelQuery, rows: Sequence[int], kernel: str = providers.AUTO) -> str | None:
    """Why a linear would gain at none of these numbers of rows; None where it would, or nothing is known."""
    if kernel == providers.AUTO:
        chosen, refused = providers.rejections(query)
        if chosen is None or chosen.name == "ref":
            return "no fast kernel: " + "; ".join(f"{name}: {why}" for name, why in refused.items())
    else:
        chosen = providers.supporting(query, kernel)
    if chosen.speedup is None:
        return None
    speedups = {count: chosen.speedup(query, count) for count in rows}
    known = {count: ratio for count, ratio in speedups.items() if ratio is not None}
    if not known or max(known.values()) >= 1.0:
        return None
    figures = ", ".join(f"{ratio:.2f}x at {count} rows" for count, ratio in known.items())
    return f"not faster with {chosen.name}: {figures}"


def gains_by_merging(query: providers.KernelQuery, kernel: str) -> bool:
    """True where the provider that would run a linear gains by one product for several."""
    chosen = providers.rejections(query)[0] if kernel == providers.AUTO else providers.named(query.op, kernel)
    return chosen is not None and chosen.merges is not None and chosen.merges(query) is True
