"""Fifth stage: faster ways to compute, on a processor and elsewhere."""
