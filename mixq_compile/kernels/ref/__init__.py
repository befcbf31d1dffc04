"""The reference in plain torch: the specification of every operator."""
