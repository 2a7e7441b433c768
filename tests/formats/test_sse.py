from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from serve_app.formats.sse import encode_event, keep_alive


def test_an_event_is_two_lines_and_an_empty_one() -> None:
    name, data, *rest = encode_event("a.b", {"type": "a.b", "text": "two\nlines\u2028é"}).decode().split("\n")
    assert name == "event: a.b"
    assert json.loads(data.removeprefix("data: ")) == {"type": "a.b", "text": "two\nlines\u2028é"}
    assert rest == ["", ""]


async def test_what_comes_is_passed_on_and_silence_is_filled() -> None:
    go = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        yield b"1"
        await go.wait()
        yield b"2"

    heard = []
    async for chunk in keep_alive(events(), silence_s=0.01):
        heard.append(chunk)
        if heard.count(b": keep-alive\n\n") == 2:
            go.set()
    assert heard[0] == b"1" and heard[-1] == b"2"
    assert set(heard[1:-1]) == {b": keep-alive\n\n"}


async def test_an_error_comes_through() -> None:
    async def events() -> AsyncIterator[bytes]:
        yield b"1"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        _ = [chunk async for chunk in keep_alive(events())]


@pytest.mark.parametrize("silence_s", [0.001, 10])
async def test_a_stream_that_is_closed_closes_its_source_before_it_returns(silence_s: float) -> None:
    closed = False

    async def events() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            yield b"1"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            closed = True

    stream = keep_alive(events(), silence_s)
    assert await anext(stream) == b"1"
    reading = asyncio.ensure_future(anext(stream))  # it waits inside the source
    await asyncio.sleep(0.02)
    reading.cancel()
    await asyncio.wait([reading])
    await stream.aclose()  # type: ignore[attr-defined]
    assert closed
