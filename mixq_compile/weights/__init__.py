"""Weights as few bits: what formats mean, how scales are solved for, how codes lie in memory, low rank.

Plain torch on tensors: nothing here knows operators, kernels, graphs or modules.
"""
