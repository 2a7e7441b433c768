"""An ASGI application behind a real socket: uvicorn on a thread and a port of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn


@dataclass(frozen=True)
class Serving:
    url: str
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function on the server's event loop, where what it is built of lives."""
        self.loop.call_soon_threadsafe(function, *arguments)


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[Serving]:
    """Serves until the block ends; then every connection is cut."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=0, lifespan="off")
    )
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        bound = server.servers[0].sockets[0].getsockname()[1]
        yield Serving(f"http://127.0.0.1:{bound}", loops[0])
    finally:
        server.should_exit = True
        thread.join(timeout=30)
