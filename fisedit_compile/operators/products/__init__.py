"""Products with the weights of linear layers, as they are or packed."""
