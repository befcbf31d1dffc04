"""4-bit weights, 8-bit activations, outlier columns in 16 bit."""

from mixq_compile.formats import INT4, INT8
from mixq_compile.scheme import OutlierPolicy, QuantScheme

SCHEME = QuantScheme(
    name="w4a8o16",
    summary="int4 weights with clip search, int8 activations, outlier columns in 16 bit",
    weight=INT4,
    activation=INT8,
    outliers=OutlierPolicy(),
    solver="clip",
)
