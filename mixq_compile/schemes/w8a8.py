"""Plain int8: no outlier columns (a threshold of infinity)."""

from mixq_compile.scheme import QuantScheme, TensorFormat

SCHEME = QuantScheme(
    name="w8a8",
    summary="int8 weights and activations, no outlier columns: fast, and inexact where outliers are",
    weight=TensorFormat(bits=8, granularity="channel"),
    activation=TensorFormat(bits=8, granularity="token", dynamic=True),
)
