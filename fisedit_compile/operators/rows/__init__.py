"""Reading rows from maps and writing them back."""
