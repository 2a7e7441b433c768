"""What can be asked and what comes back. The standard library and pydantic alone."""

from serve_app.request.schema import ImageRequest, ImageResult

__all__ = ["ImageRequest", "ImageResult"]
