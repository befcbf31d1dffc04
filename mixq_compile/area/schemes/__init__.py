"""The named functions: one file a scheme."""

from __future__ import annotations

from mixq_compile.area.schemes.atom import estimate_area_atom
from mixq_compile.area.schemes.awq import estimate_area_awq
from mixq_compile.area.schemes.fp16 import estimate_area_fp16
from mixq_compile.area.schemes.gptq import estimate_area_gptq
from mixq_compile.area.schemes.llm_int4 import estimate_area_llm_int4
from mixq_compile.area.schemes.llm_int8 import estimate_area_llm_int8
from mixq_compile.area.schemes.lqer_int4 import estimate_area_lqer_int4
from mixq_compile.area.schemes.lqer_int8 import estimate_area_lqer_int8
from mixq_compile.area.schemes.lqer_mxint2 import estimate_area_lqer_mxint2
from mixq_compile.area.schemes.lqer_mxint4 import estimate_area_lqer_mxint4
from mixq_compile.area.schemes.mixq import estimate_area_mixq
from mixq_compile.area.schemes.quik import estimate_area_quik
from mixq_compile.area.schemes.smoothquant import estimate_area_smoothquant
from mixq_compile.area.schemes.w8a8 import estimate_area_w8a8

__all__ = [
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
]
