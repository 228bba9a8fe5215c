"""What became sparse, what stays dense and why, and what was measured: ``fisedit_compile.explain`` and its tables."""
