"""The HTTP routes, a module a wire format. Each adds its own to the application and renders its own errors."""
