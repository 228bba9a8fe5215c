"""Finding where a new prompt changes the picture, by calls of the network on what the recorded run gave it."""
