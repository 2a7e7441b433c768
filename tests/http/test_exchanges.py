"""Exchanges under way, as a service that drains counts them."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve_app.http.exchanges import CountExchanges, Exchanges


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
