"""The ASGI application. Nothing here knows of Ray."""
