"""Steps by which one tensor is computed from a parameter; each is a value that two compilations share."""
