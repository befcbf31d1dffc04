"""8 bit after calibration: weights by error feedback, outlier columns found while running."""

from mixq_compile.formats import INT8
from mixq_compile.scheme import OutlierPolicy, QuantScheme

SCHEME = QuantScheme(
    name="auto8",
    summary="w8a8o16 with weights by error feedback (GPTQ), from calibration: the most accurate 8-bit scheme",
    weight=INT8,
    activation=INT8,
    outliers=OutlierPolicy(),
    solver="error_feedback",
)
