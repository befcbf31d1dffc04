"""The rows of what `mixq eval` measures, and what is said below them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixq_compile.evaluation import Divergence
    from mixq_compile.runtime.report_tables import Report

PLAIN = "w8a8"
"""The scheme that times are compared with: what others do beside plain int8 costs the rest."""


def row_of(
    label: str,
    scheme: str,
    result: Divergence,
    reference: Divergence | None,
    report: Report | None,
) -> dict[str, Any]:
    """What a language model's logits were, beside the reference's where there is one."""
    return {
        "label": label,
        "scheme": scheme,
        "perplexity": result.perplexity,
        "perplexity_error": result.perplexity_error,
        "delta": None if reference is None else result.perplexity - reference.perplexity,
        "delta_share": None if reference is None else result.delta,
        "delta_share_error": None if reference is None else result.delta_error,
        "kl": None if reference is None else result.kl,
        "top1": None if reference is None else result.top1,
        "sqnr_db": None if reference is None else result.sqnr_db,
        "seconds": result.seconds,
        "time_beside_w8a8": None,
        **linear_figures(report),
        "notes": [],
        "generated": None,
        "agreement": None,
    }


def linear_figures(report: Report | None) -> dict[str, Any]:
    """How many linears are quantized, in how many bits, and their columns in 16 bit."""
    quantized = report.quantized if report else ()
    shares = {linear.fqn: len(linear.outlier_columns) / linear.in_features for linear in quantized}
    weights = sum(linear.out_features * linear.in_features for linear in quantized)
    held = sum(linear.bytes_after for linear in quantized)
    return {
        "linears": None if report is None else len(report.linears),
        "quantized": len(quantized),
        "bits_per_weight": 8 * held / weights if weights else None,
        "linear_bytes": None if report is None else sum(linear.bytes_after for linear in report.linears),
        "outlier_share": {"mean": sum(shares.values()) / len(shares), "max": max(shares.values())}
        if shares
        else None,
        "outlier_share_of": shares,
        "overflowing": [linear.fqn for linear in quantized if linear.overflow],
    }


def linear_notes(report: Report, *, is_forced: bool) -> list[str]:
    """What a reader should know about the linears of a row."""
    notes = []
    if not report.quantized:
        reasons = sorted({linear.skip or "" for linear in report.linears})
        advice = "" if is_forced else " --force quantizes them all the same."
        notes.append(f"no linear was quantized: {'; '.join(reasons)}.{advice}")
    crowded = [linear.fqn for linear in report.quantized if linear.overflow]
    if crowded:
        notes.append(
            f"more outlier columns than slots in {len(crowded)} linears, such as {crowded[0]}: "
            "a larger --capacity or --threshold changes that"
        )
    return notes


def beside_plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their times beside that of plain int8, where it is among them."""
    plain = next((row["seconds"] for row in rows if row["scheme"] == PLAIN), None)
    return [{**row, "time_beside_w8a8": plain and row["seconds"] / plain} for row in rows]
