"""Lets the type checker find the top-level folders ``passes`` and ``runtime`` under their installed names."""
