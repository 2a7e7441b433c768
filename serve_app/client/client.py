"""The Python client: requests by the service's own definition over HTTP, results as the handle gives them.

    with Client("http://127.0.0.1:8000") as client:
        result = client.generate("a red circle", seed=7, num_inference_steps=25)
        result.images[0].to_pil()

Pictures always travel as a stream: the service keeps it alive while they wait, so `timeout_s` bounds a silence
and not a drawing. Needs neither torch nor Ray. What the two clients share is in `client/wire.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import Any

import httpx

from serve_app.client.wire import (
    GENERATIONS,
    Asked,
    ImageEvent,
    Retries,
    ServiceUnreachable,
    StreamBroken,
    StreamReader,
    UnexpectedAnswer,
    broken_streams,
    checked,
    clear_faults,
    error_of,
    http_options,
    is_stream,
    json_object,
    model_names,
    service_info,
)
from serve_app.http.info import ServiceInfo
from serve_app.request.errors import ServiceError
from serve_app.request.schema import ImageRequest, ImageResult

__all__ = ["AsyncClient", "Client", "ImageEvent", "ServiceUnreachable", "StreamBroken", "UnexpectedAnswer"]


class Client:
    """A service at an address, called from plain code. Close it, or use it as a context manager.

    Threads may share one. Every method raises `ServiceError`s: the class is that of the fault (`InvalidRequest`,
    `Overloaded`, ...), `param` the field at fault, `retry_after_s` when to come back. A 503 is tried again,
    `max_retries` times, after the time it names; so is a connection that breaks before anything of its answer was
    handed out, though once only where pictures were on their way: a time limit may have cut it. A 4xx and a refused
    connection are not.

    Args:
        url: address of the service, e.g. http://127.0.0.1:8000.
        timeout_s: seconds of silence, and of connecting, that are too many. The service speaks every 15 s.
        headers: of every request, e.g. for a gateway before the service.
        transport: httpx's way to the service, for tests and special networks.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        headers: dict[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._max_retries = max_retries
        self._http = httpx.Client(transport=transport, **http_options(url, timeout_s, headers))

    def generate(self, request: ImageRequest | str, **fields: Any) -> ImageResult:
        """Draws a request, or a prompt; `fields` are `ImageRequest`'s."""
        asked = Asked.of(request, fields)
        retries = Retries(self._max_retries)
        while True:
            try:
                *_, result = self._events(asked)
                assert isinstance(result, ImageResult)
                return result
            except ServiceError as error:
                wait_s = retries.wait_s(error)
            time.sleep(wait_s)

    def stream(
        self, request: ImageRequest | str, *, partial_images: int = 0, progress: bool = True, **fields: Any
    ) -> Generator[ImageEvent, None, None]:
        """Draws a request and yields what happens on the way; the `ImageResult` comes last.

        `partial_images`: previews of each picture, 0 to 3. Closing the generator, or a reader that goes away, frees the
        request's slots in the service.
        """
        return self._retried(Asked.of(request, fields, partial_images, progress))

    def models(self) -> list[str]:
        """The names that the service answers to; the first is its own."""
        return model_names(self._get("/v1/models"))

    def health(self) -> dict[str, Any]:
        """What the service says of itself at `/health`."""
        return json_object(self._get("/health"))

    def info(self) -> ServiceInfo:
        """What is served, and within which limits."""
        return service_info(self._get("/v1/sdxl/info"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _retried(self, asked: Asked) -> Generator[ImageEvent, None, None]:
        retries = Retries(self._max_retries)
        while True:
            begun = False
            try:
                with closing(self._events(asked)) as events:
                    for event in events:
                        begun = True
                        yield event
                return
            except ServiceError as error:
                wait_s = retries.wait_s(error, begun)
            time.sleep(wait_s)

    def _events(self, asked: Asked) -> Generator[ImageEvent, None, None]:
        with clear_faults(self._http), self._http.stream("POST", GENERATIONS, **asked.post()) as response:
            if not is_stream(response):
                response.read()
                raise error_of(response)
            reader = StreamReader(asked.request.n, response.headers.get("x-request-id", ""))
            with broken_streams(self._http):
                for chunk in response.iter_bytes():
                    yield from reader.feed(chunk)
            reader.end()

    def _get(self, path: str) -> httpx.Response:
        retries = Retries(self._max_retries)
        while True:
            try:
                with clear_faults(self._http):
                    return checked(self._http.get(path))
            except ServiceError as error:
                wait_s = retries.wait_s(error)
            time.sleep(wait_s)


class AsyncClient:
    """`Client` for asyncio: the same methods and rules. A cancelled call frees its slots in the service."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        headers: dict[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._max_retries = max_retries
        self._http = httpx.AsyncClient(transport=transport, **http_options(url, timeout_s, headers))

    async def generate(self, request: ImageRequest | str, **fields: Any) -> ImageResult:
        """Draws a request, or a prompt; `fields` are `ImageRequest`'s."""
        asked = Asked.of(request, fields)
        retries = Retries(self._max_retries)
        while True:
            try:
                async with aclosing(self._events(asked)) as events:
                    async for event in events:
                        if isinstance(event, ImageResult):
                            result = event
                return result
            except ServiceError as error:
                wait_s = retries.wait_s(error)
            await asyncio.sleep(wait_s)

    def stream(
        self, request: ImageRequest | str, *, partial_images: int = 0, progress: bool = True, **fields: Any
    ) -> AsyncGenerator[ImageEvent, None]:
        """Draws a request and yields what happens on the way; the `ImageResult` comes last.

        Whoever may leave it early wraps it in `contextlib.aclosing`: then its slots in the service are free at once.
        """
        return self._retried(Asked.of(request, fields, partial_images, progress))

    async def models(self) -> list[str]:
        """The names that the service answers to; the first is its own."""
        return model_names(await self._get("/v1/models"))

    async def health(self) -> dict[str, Any]:
        """What the service says of itself at `/health`."""
        return json_object(await self._get("/health"))

    async def info(self) -> ServiceInfo:
        """What is served, and within which limits."""
        return service_info(await self._get("/v1/sdxl/info"))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _retried(self, asked: Asked) -> AsyncGenerator[ImageEvent, None]:
        retries = Retries(self._max_retries)
        while True:
            begun = False
            try:
                async with aclosing(self._events(asked)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except ServiceError as error:
                wait_s = retries.wait_s(error, begun)
            await asyncio.sleep(wait_s)

    async def _events(self, asked: Asked) -> AsyncGenerator[ImageEvent, None]:
        with clear_faults(self._http):
            async with self._http.stream("POST", GENERATIONS, **asked.post()) as response:
                if not is_stream(response):
                    await response.aread()
                    raise error_of(response)
                reader = StreamReader(asked.request.n, response.headers.get("x-request-id", ""))
                with broken_streams(self._http):
                    async for chunk in response.aiter_bytes():
                        for event in reader.feed(chunk):
                            yield event
                reader.end()

    async def _get(self, path: str) -> httpx.Response:
        retries = Retries(self._max_retries)
        while True:
            try:
                with clear_faults(self._http):
                    return checked(await self._http.get(path))
            except ServiceError as error:
                wait_s = retries.wait_s(error)
            await asyncio.sleep(wait_s)
