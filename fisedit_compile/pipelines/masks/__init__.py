"""Where a picture changes: finding the mask, carrying it between latents and pixels, pasting."""
