"""The exchanges under way: a service that shuts down waits until those that it had have ended. Pure ASGI."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.runtime.admission import ARRIVED_IN_TIME


class Exchanges:
    """Counts requests from their first byte to the last of their answer, over HTTP and by handle.

    Those that began before the drain are taken in (`ARRIVED_IN_TIME`), though their bodies may still be on the way.
    """

    def __init__(self) -> None:
        self._under_way: set[object] = set()
        self._left: set[object] | None = None

    def drain(self) -> int:
        """How many of those that were under way at the first call still are.

        Later ones are refused, and each takes a moment: clients that try again and again would keep the count up.
        """
        if self._left is None:
            self._left = set(self._under_way)
        return len(self._left)

    @contextmanager
    def one(self) -> Iterator[None]:
        """One exchange, until the block ends."""
        one = object()
        self._under_way.add(one)
        # Never reset: a generator may end in another context, and each exchange sets its own before it is taken in.
        ARRIVED_IN_TIME.set(self._left is None)
        try:
            yield
        finally:
            self._under_way.discard(one)
            if self._left is not None:
                self._left.discard(one)


class CountExchanges:
    """The middleware that does the counting."""

    def __init__(self, app: ASGIApp, exchanges: Exchanges) -> None:
        self._app = app
        self._exchanges = exchanges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._exchanges.one():
            await self._app(scope, receive, send)
