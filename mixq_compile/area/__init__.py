"""Circuit area of quantized linears: named functions over one engine of components. Nothing imports torch.

`estimate_area_llm_int8((1, 4096), (4096, 11008), 353)` is an area; with `report=True` it is an AreaReport
with parts, cycles, energy and everything that was assumed.
"""

from __future__ import annotations

from mixq_compile.area.assumptions import Assumptions
from mixq_compile.area.components import fixed_dot, float_dot, mxint_dot
from mixq_compile.area.linear_areas import LinearSize, linear_area
from mixq_compile.area.report import AreaReport
from mixq_compile.area.schemes import (
    estimate_area_atom,
    estimate_area_awq,
    estimate_area_fp16,
    estimate_area_gptq,
    estimate_area_llm_int4,
    estimate_area_llm_int8,
    estimate_area_lqer_int4,
    estimate_area_lqer_int8,
    estimate_area_lqer_mxint2,
    estimate_area_lqer_mxint4,
    estimate_area_mixq,
    estimate_area_quik,
    estimate_area_smoothquant,
    estimate_area_w8a8,
)
from mixq_compile.area.units import unit_area

__all__ = [
    "AreaReport",
    "Assumptions",
    "LinearSize",
    "estimate_area_atom",
    "estimate_area_awq",
    "estimate_area_fp16",
    "estimate_area_gptq",
    "estimate_area_llm_int4",
    "estimate_area_llm_int8",
    "estimate_area_lqer_int4",
    "estimate_area_lqer_int8",
    "estimate_area_lqer_mxint2",
    "estimate_area_lqer_mxint4",
    "estimate_area_mixq",
    "estimate_area_quik",
    "estimate_area_smoothquant",
    "estimate_area_w8a8",
    "fixed_dot",
    "float_dot",
    "linear_area",
    "mxint_dot",
    "unit_area",
]
