"""First stage: one spelling for each operation."""
