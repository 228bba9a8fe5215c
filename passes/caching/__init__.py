"""Fourth stage: what a recorded call stores, what an edit loads, what is computed only once."""
