"""A small real HTTP server that answers as the service does, or as a broken one would: by the prompt."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"


@dataclass
class FakeService:
    """`prompt` says what happens; `denoise_s` is how long a picture takes; `bodies` is what it was asked."""

    denoise_s: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    gone: int = 0  # clients that went away

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/v1/images/generations", self._generations, methods=["POST"])])

    async def _generations(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(request, body)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: Request, body: dict[str, Any]) -> Response:
        match body["prompt"]:
            case "full":
                error = {"message": "the service is full", "type": "overloaded_error", "param": None, "code": None}
                return JSONResponse({"error": error}, 503, {"Retry-After": "7"})
            case "bad":
                return JSONResponse({"error": {"message": "steps: too many\nby far"}}, 400)
            case "dropped":
                return StreamingResponse(self._drop(), headers={"Content-Length": "1000"})
            case "hang":
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
                self.gone += 1
                return Response(status_code=499)
            case "no picture":
                return JSONResponse({"data": [{"b64_json": None}]})
        if body.get("stream"):
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        await asyncio.sleep(self.denoise_s)
        timing = (
            f"encode;dur=3.1, denoise;dur={self.denoise_s * 1000:.1f}, refine;dur=2.0, decode;dur=1.0, queue;dur=5.5"
        )
        return JSONResponse(
            {"created": 1, "data": [{"b64_json": "AAAA"}] * body["n"]}, headers={"Server-Timing": timing}
        )

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for image in range(body["n"]):
            for preview in range(body.get("partial_images", 0)):
                await asyncio.sleep(self.denoise_s / 4)
                yield event(PARTIAL, b64_json="AAAA", partial_image_index=preview, image_index=image)
            await asyncio.sleep(self.denoise_s)
            if body["prompt"] == "fails midway":
                yield event("error", error={"message": "a stage was lost", "type": "server_error"})
                return
            if body["prompt"] == "ends early":
                return
            timings = [
                {"stage": "encode", "seconds": 0.25, "queue_seconds": 0.0},
                {"stage": "denoise", "seconds": 2.0, "queue_seconds": 0.5},
            ]
            yield event(COMPLETED, b64_json="AAAA", image_index=image, timings=timings)

    async def _drop(self) -> AsyncIterator[bytes]:
        yield b'{"data": ['
        await asyncio.sleep(0.02)
        raise ConnectionResetError


def event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | data)}\n\n"


@contextmanager
def serving(service: FakeService) -> Iterator[FakeService]:
    with serving_app(service.app()) as url:
        service.url = url
        yield service


@contextmanager
def serving_app(app: Any) -> Iterator[str]:
    """Serves an ASGI application on a port of its own, in a thread."""
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        place.close()
