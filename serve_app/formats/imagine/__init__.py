"""Ray's own example route."""
