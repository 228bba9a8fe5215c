"""What is particular to a family of pipelines: guidance, prompts, latents, schedulers."""
