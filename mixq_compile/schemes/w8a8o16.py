"""MixQ at 8 bit: int8 weights and activations, outlier columns in 16 bit, found while running."""

from mixq_compile.formats import INT8
from mixq_compile.scheme import OutlierPolicy, QuantScheme

SCHEME = QuantScheme(
    name="w8a8o16",
    summary="int8 weights and activations, outlier columns in 16 bit, found while running (default)",
    weight=INT8,
    activation=INT8,
    outliers=OutlierPolicy(),
)
