"""Hugging Face's text-to-image."""
