"""Attention of rows over a recorded map, and of whole maps."""
