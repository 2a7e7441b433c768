"""Stability's version 1."""
