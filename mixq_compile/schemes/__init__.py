"""The quantization schemes: one module, one `SCHEME`. A new file here is a new scheme."""
