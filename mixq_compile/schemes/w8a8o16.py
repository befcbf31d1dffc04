"""MixQ at 8 bit: int8 weights and activations, outlier columns in 16 bit, found while running."""

from mixq_compile.scheme import OutlierPolicy, QuantScheme, TensorFormat

SCHEME = QuantScheme(
    name="w8a8o16",
    summary="int8 weights and activations, outlier columns in 16 bit, found while running (default)",
    weight=TensorFormat(bits=8, granularity="channel"),
    activation=TensorFormat(bits=8, granularity="token", dynamic=True),
    outliers=OutlierPolicy(),
)
