"""Server-sent events: `text/event-stream` as the HTML standard has it, section 9.2."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

MEDIA_TYPE = "text/event-stream"
# No proxy may keep events back, nor anybody an answer.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_KEEP_ALIVE_S = 15.0
_COMMENT = b": keep-alive\n\n"


def encode_event(name: str, data: dict[str, Any]) -> bytes:
    """One event. JSON holds no line break, so its data is one line."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def keep_alive(events: AsyncIterator[bytes], silence_s: float = _KEEP_ALIVE_S) -> AsyncIterator[bytes]:
    """The same bytes, with a comment whenever nothing came for a while: proxies cut a connection that is silent."""
    iterator = aiter(events)
    coming = asyncio.ensure_future(anext(iterator, None))
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=silence_s)
            if not done:
                yield _COMMENT
                continue
            chunk = coming.result()
            if chunk is None:
                return
            yield chunk
            coming = asyncio.ensure_future(anext(iterator, None))
    finally:
        coming.cancel()  # and with it whatever draws the next event
        await asyncio.wait([coming])
        if (close := getattr(iterator, "aclose", None)) is not None:
            await close()
