"""The tensor work of each stage: text in, latents, latents, pixels out. No Ray, no web framework."""
