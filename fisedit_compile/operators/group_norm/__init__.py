"""Group norm of a mixed map: its statistics, and how an edit updates them."""
