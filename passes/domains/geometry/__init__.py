"""How this stage tells where the positions of a value lie on the mask."""
