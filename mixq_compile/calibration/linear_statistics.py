"""What calibration learned about one linear's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mixq_compile.calibration.collected import KINDS
from mixq_compile.errors import StatisticsError


@dataclass(frozen=True, eq=False)
class LinearStatistics:
    """What the input `[rows, K]` of one linear looked like over all finite rows of calibration."""

    fqn: str
    absmax: Tensor
    """[K] fp32, on the CPU like all tensors here: the largest magnitude of each input channel."""
    mean_magnitude: Tensor
    """[K] fp32: the mean of |x|."""
    mean_square: Tensor
    """[K] fp32: the mean of x², the diagonal of the second moment XᵀX / rows."""
    rows: int
    """Finite rows (tokens) seen; the means are over these."""
    nonfinite_rows: int
    """Rows left out because they held a NaN or an infinity."""
    rows_above: Tensor
    """[T, K] int64: rows whose magnitude was above each of the T thresholds."""
    further: Mapping[str, Tensor] = field(default_factory=dict)
    """Kind to tensor of the kinds beside `channels`; linears that read one input share the tensors."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of statistics that were collected, `channels` first."""
        return tuple(kind for kind in KINDS if kind == "channels" or kind in self.further)

    @property
    def gram(self) -> Tensor:
        """[K, K] fp32, symmetric: XᵀX of the finite rows; over `rows` it is the mean second moment.

        Raises StatisticsError where it was not collected.
        """
        return self._further("gram")

    @property
    def sample(self) -> Tensor:
        """[S, K] fp32: up to 512 of the finite rows, drawn evenly, in the order in which they came.

        Raises StatisticsError where it was not collected.
        """
        return self._further("sample")

    def _further(self, kind: str) -> Tensor:
        if kind not in self.further:
            wanted = ", ".join(repr(name) for name in KINDS if name == kind or name in self.further)
            raise StatisticsError(
                f"the {kind} of the input of {self.fqn!r} was not collected, only {', '.join(self.kinds)}: "
                f"calibrate again with kinds=({wanted},)."
            )
        return self.further[kind]

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return self.absmax.shape[0]
