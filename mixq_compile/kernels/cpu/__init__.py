"""CPU kernels: C++ with VNNI, compiled on first use."""
