"""What reports say of a linear that was swapped."""

from __future__ import annotations

from mixq_compile.ir.roles import role_of
from mixq_compile.runtime.compilation import LinearRecord
from mixq_compile.runtime.mixq_linear import MixqLinear


def swap_record(name: str, module: MixqLinear) -> LinearRecord:
    """The record of one MixqLinear, read from the module itself."""
    return LinearRecord(
        fqn=name,
        role=role_of(name, (module.out_features, module.in_features)),
        out_features=module.out_features,
        in_features=module.in_features,
        scheme=module.scheme.name,
        kernel=None,
        skip=None,
        outlier_weight_source=module.outlier_weight_source,
        float_bytes=module.out_features * module.in_features * module.weight_marker.element_size(),
    )
