"""The captured graph: values, names, annotations, snapshots and the verifier."""
