"""Second stage: which values are spatial, at which resolution and place."""
