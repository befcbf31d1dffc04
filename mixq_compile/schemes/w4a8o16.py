"""4-bit weights, 8-bit activations, outlier columns in 16 bit."""

from mixq_compile.scheme import OutlierPolicy, QuantScheme, TensorFormat

SCHEME = QuantScheme(
    name="w4a8o16",
    summary="int4 weights with clip search, int8 activations, outlier columns in 16 bit",
    weight=TensorFormat(bits=4, granularity="channel", solver="clip"),
    activation=TensorFormat(bits=8, granularity="token", dynamic=True),
    outliers=OutlierPolicy(),
)
