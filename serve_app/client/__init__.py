"""The Python client, sync and async. Loads neither torch nor Ray."""

from serve_app.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
