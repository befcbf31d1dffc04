"""How the codes and scales of a weight are found: one solver a module, found by name (`registry`)."""
