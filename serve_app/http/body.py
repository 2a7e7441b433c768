"""A request's body on its way in: within its time, and decompressed. Sizes are the routes' own to bound."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable

from starlette.types import Message, Receive

from serve_app.request.errors import BodyTimeout, BodyTooLarge, InvalidRequest, UnsupportedMediaType

# What one message gives a route at most, however well it was compressed: then the route counts again.
_PIECE = 64 * 1024
_GZIP = 16 + zlib.MAX_WBITS
# A client compresses a body in one piece; each further one costs as much as a long piece, be it empty.
MAX_MEMBERS = 16
_NAMES = {"gzip": True, "x-gzip": True, "identity": False, "": False}


def is_compressed(content_encoding: str) -> bool:
    """Whether a body comes as gzip. Raises `UnsupportedMediaType` for anything else that it is not plain in."""
    encodings = [part.strip().lower() for part in content_encoding.split(",")]
    if len(encodings) == 1 and encodings[0] in _NAMES:
        return _NAMES[encodings[0]]
    raise UnsupportedMediaType(f"Content-Encoding: {content_encoding[:100]!r} is not read here; gzip is")


def in_time(receive: Receive, seconds: float) -> Receive:
    """The same messages; raises `BodyTimeout` where the whole body is not there so many seconds after the first ask.

    What comes after the body, which is only that the client went away, may take as long as it likes.
    """
    deadline: float | None = None
    complete = False

    async def receive_in_time() -> Message:
        nonlocal deadline, complete
        if complete:
            return await receive()
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive within {seconds:g} s") from None
        complete = not message.get("more_body", False)
        return message

    return receive_in_time


def decompressed(receive: Receive, max_compressed_bytes: Callable[[], int]) -> Receive:
    """A gzip body's messages, decompressed a piece at a time; between two pieces others have the event loop.

    `max_compressed_bytes` is asked as the bytes come: the route that reads them knows.
    Raises `BodyTooLarge` where it has more bytes compressed than it may have at all, and `InvalidRequest` where it is
    no gzip, not all of it, or in more than `MAX_MEMBERS` members.
    """
    decompressor = zlib.decompressobj(_GZIP)
    waiting = b""  # compressed bytes that came and were not read yet
    received = 0
    members = 1
    arriving = True  # until the last compressed byte
    begun = done = False

    async def fill() -> Message | None:
        """Takes in the next message; gives it back where it is none of a body."""
        nonlocal waiting, received, arriving
        message = await receive()
        if message["type"] != "http.request":
            return message
        waiting += message.get("body", b"")
        received += len(message.get("body", b""))
        arriving = message.get("more_body", False)
        if received > (most := max_compressed_bytes()):
            raise BodyTooLarge(f"the body is larger than {most} bytes")
        return None

    async def receive_decompressed() -> Message:
        nonlocal decompressor, waiting, members, begun, done
        if done:
            return await receive()
        while True:
            await asyncio.sleep(0)  # others may want the loop meanwhile
            if decompressor.eof:  # a file may have several members, one after the other
                waiting = decompressor.unused_data + waiting
                if waiting:
                    members += 1
                    if members > MAX_MEMBERS:
                        raise InvalidRequest(f"the body has more than {MAX_MEMBERS} gzip members")
                    decompressor = zlib.decompressobj(_GZIP)
                elif not arriving:
                    done = True
                    return {"type": "http.request", "body": b"", "more_body": False}
            if not waiting:
                if not arriving:
                    if not begun:  # no body at all, whatever its header says
                        done = True
                        return {"type": "http.request", "body": b"", "more_body": False}
                    raise InvalidRequest("the body is not valid gzip: it is cut off")
                if (other := await fill()) is not None:
                    return other
                continue
            begun = True
            try:
                piece = decompressor.decompress(waiting, _PIECE)
            except zlib.error:
                raise InvalidRequest("the body is not valid gzip") from None
            waiting = b"" if decompressor.eof else decompressor.unconsumed_tail
            if piece:
                return {"type": "http.request", "body": piece, "more_body": True}

    return receive_decompressed
