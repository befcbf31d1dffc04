"""Weight-only int8 (the scheme of EETQ): activations stay in 16 bit."""

from mixq_compile.formats import INT8
from mixq_compile.scheme import QuantScheme

SCHEME = QuantScheme(
    name="w8a16",
    summary="int8 weights, 16-bit activations: halves the weights' memory, for small batches",
    weight=INT8,
)
