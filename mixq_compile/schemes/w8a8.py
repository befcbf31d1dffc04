"""Plain int8: no outlier columns (a threshold of infinity)."""

from mixq_compile.formats import INT8
from mixq_compile.scheme import QuantScheme

SCHEME = QuantScheme(
    name="w8a8",
    summary="int8 weights and activations, no outlier columns: fast, and inexact where outliers are",
    weight=INT8,
    activation=INT8,
)
