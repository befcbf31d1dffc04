"""Views of a history: terminal, and what else reads it."""
