"""Operators that look at strides."""
