"""MixQ at 4 bit: int4 weights and activations, outlier columns in 16 bit."""

from mixq_compile.scheme import OutlierPolicy, QuantScheme, TensorFormat

SCHEME = QuantScheme(
    name="w4a4o16",
    summary="int4 weights and activations, outlier columns in 16 bit; down projections at 8 bit",
    weight=TensorFormat(bits=4, granularity="channel", solver="clip"),
    activation=TensorFormat(bits=4, granularity="token", dynamic=True),
    outliers=OutlierPolicy(),
    eight_bit_roles=("down",),
)
