"""Ways to run a model's forward pass."""
