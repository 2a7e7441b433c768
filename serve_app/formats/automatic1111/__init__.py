"""AUTOMATIC1111's webui."""
