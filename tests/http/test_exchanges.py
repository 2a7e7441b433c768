"""Exchanges under way, as a service that drains counts them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve_app.http.app import build_http_app
from serve_app.http.exchanges import CountExchanges, Exchanges
from tests.fakes import FakeStages, service


async def test_those_that_were_there_count_until_their_last_byte() -> None:
    exchanges, gate, waiting = Exchanges(), asyncio.Event(), 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal waiting
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/slow":
            waiting += 1
            await gate.wait()
        if scope["path"] == "/broken":
            raise RuntimeError("a fault")
        await send({"type": "http.response.body", "body": b"x"})

    transport = httpx.ASGITransport(app=CountExchanges(app, exchanges))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        await client.get("/")
        with pytest.raises(RuntimeError):
            await client.get("/broken")
        slow = [asyncio.create_task(client.get("/slow")) for _ in range(2)]
        while waiting < 2:
            await asyncio.sleep(0.001)
        assert exchanges.drain() == 2
        later = asyncio.create_task(client.get("/slow"))
        await client.get("/")
        assert exchanges.drain() == 2, "those that came later don't count"
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*slow, later)] == [200] * 3
    assert exchanges.drain() == 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_that_had_arrived_is_taken_in_though_its_body_had_not(streamed: bool) -> None:
    exchanges, images, rest = Exchanges(), service(FakeStages()), asyncio.Event()
    app = CountExchanges(build_http_app(images), exchanges)
    body = b'{"prompt": "p", "stream": %s}' % (b"true" if streamed else b"false")
    half = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:5]
        half.set()
        await rest.wait()
        yield body[5:]

    sent: dict[str, Any] = {"headers": {"Content-Type": "application/json"}}
    async with (
        asyncio.timeout(60),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1", timeout=None) as client,
    ):
        early = asyncio.create_task(client.post("/v1/images/generations", content=slowly(), **sent))
        await half.wait()
        images.drain()
        assert exchanges.drain() == 1
        late = await client.post("/v1/images/generations", content=body, **sent)
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        rest.set()
        answer = await early
        assert answer.status_code == 200 and ("completed" in answer.text) is streamed
    assert exchanges.drain() == 0


async def test_what_a_handle_asked_for_counts_until_it_is_given() -> None:
    exchanges = Exchanges()

    async def events() -> AsyncIterator[int]:
        with exchanges.one():
            for event in range(3):
                yield event

    reader = events()
    assert await anext(reader) == 0
    assert exchanges.drain() == 1
    assert [event async for event in reader] == [1, 2]
    assert exchanges.drain() == 0
