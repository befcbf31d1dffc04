"""The schemes whose weights are made without statistics, for tests that calibrate nothing."""

from mixq_compile.schemes.registry import get_scheme, scheme_names
from mixq_compile.weights.recipe import needs

UNCALIBRATED = tuple(name for name in scheme_names() if not needs(get_scheme(name).recipe))
