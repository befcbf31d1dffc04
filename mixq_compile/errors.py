"""The errors a user can meet; each says what, where, why and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixqError(Exception):
    """Base of every error that mixq_compile raises on purpose."""


class OptionError(MixqError, ValueError):
    """An option, name or value that the user gave is not valid."""


class PipelineError(MixqError):
    """A pipeline text, contract or pass failed."""


class ContractError(PipelineError, OptionError):
    """The passes of a pipeline are in an order in which one lacks what it requires."""


class VerificationError(PipelineError):
    """A graph's recorded shapes, dtypes or annotations contradict what its operators compute."""


class StatisticsError(MixqError):
    """A statistics file is corrupt, of another version, or belongs to another model."""


class KernelError(MixqError):
    """No kernel provider supports a call, or a provider failed its self-test."""


class OperandError(MixqError, RuntimeError):
    """A tensor has a shape, dtype or device that does not fit the other operands of a quantized linear."""


class CheckpointError(MixqError):
    """A quantized checkpoint cannot be written or read."""


class ReleasedWeightError(MixqError, RuntimeError):
    """A 16-bit weight was needed after `release_weights` or `quantize` had freed it."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> OptionError:
    """Builds the error for an unknown name: lists the valid ones and the nearest.

    Args:
        kind: what the name names, for example `"scheme"`.
        name: what the user wrote.
        valid: every valid name.
    """
    choices = sorted(valid)
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(choices)}.")
