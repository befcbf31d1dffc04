"""Weights as values: what is computed from a parameter before it is packed, and how."""
