"""Registers the format with transformers: once, when its list of quantizers is loaded."""

from __future__ import annotations


def register() -> None:
    """Makes `from_pretrained` know `quant_method: "mixq"`; a second call does nothing."""
    from transformers.quantizers import auto

    from mixq_compile.checkpoints.schema import QUANT_METHOD
    from mixq_compile.runtime.transformers_config import MixqConfig
    from mixq_compile.runtime.transformers_quantizer import MixqHfQuantizer

    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(MixqConfig)
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(QUANT_METHOD)(MixqHfQuantizer)
