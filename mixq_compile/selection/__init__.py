"""Which linears are quantized, how and why not: what passes, `quantize` and reports decide alike."""
