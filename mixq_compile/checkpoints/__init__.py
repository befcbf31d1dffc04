"""Quantized directories on disk: what their files say, how they are read, written and checked."""
