"""Stable Diffusion XL served as a Ray Serve graph: encode, denoise, refine, decode."""

__version__ = "0.1.0"
