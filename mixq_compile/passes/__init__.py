"""The compiler passes: one module, one pass. A new file here is a new pass."""
