"""From latents to pictures and back: sparsely where that is cheaper."""
