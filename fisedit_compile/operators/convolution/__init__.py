"""Convolutions: on rows, by tiles, and of whole maps."""
