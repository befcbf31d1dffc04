"""mixq_compile."""
