"""MixQ at 4 bit: int4 weights and activations, outlier columns in 16 bit."""

from mixq_compile.formats import INT4
from mixq_compile.scheme import OutlierPolicy, QuantScheme

SCHEME = QuantScheme(
    name="w4a4o16",
    summary="int4 weights and activations, outlier columns in 16 bit; down projections at 8 bit",
    weight=INT4,
    activation=INT4,
    outliers=OutlierPolicy(choose="largest"),
    solver="clip",
    instead=(("down", "w8a8o16"),),
)
