"""How the passes of this stage read operators: products of matrices, parts of joined values."""
