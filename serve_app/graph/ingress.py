"""The ingress: every format's way in, and the order of the stages. Loads no torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config.settings import AppConfig
from serve_app.graph.calls import describe, remote_stages
from serve_app.graph.metrics import CallMetrics
from serve_app.graph.proxies import http_options
from serve_app.graph.readiness import Readiness, ask_replica
from serve_app.graph.replica import check_options
from serve_app.http.app import build_http_app
from serve_app.http.exchanges import CountExchanges, Exchanges
from serve_app.request.facts import ModelFacts
from serve_app.request.resolve import check_native_size
from serve_app.request.schema import ImageRequest, ImageResult, StreamEvent
from serve_app.runtime.service import ImageService

logger = logging.getLogger("ray.serve")


@serve.deployment
@serve.ingress()
class Ingress:
    """HTTP by the ASGI application, Python by `generate` and `stream`."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        config: AppConfig,
        encoder: DeploymentHandle,
        base: DeploymentHandle,
        refiner: DeploymentHandle | None,
        decoder: DeploymentHandle,
    ) -> None:
        check_options(config)
        # Only the replicas read the checkpoints, so what must be known of them is asked of them.
        stages = [stage for stage in (encoder, decoder, base, refiner) if stage is not None]
        text, decoded, *denoisers = await asyncio.gather(*(describe(stage, config.checkpoints) for stage in stages))
        facts = ModelFacts(
            text,
            denoisers[0],
            denoisers[1] if refiner is not None else None,
            decoded,
            embedded_demo=config.base.path == "embedded:base",
        )
        check_native_size(facts.base.native_size_px, config.limits)
        config = await _behind_the_proxies(config)
        self._service = ImageService(config, facts, remote_stages(encoder, base, refiner, decoder, CallMetrics().lost))
        handles = {"encode": encoder, "denoise": base, "refine": refiner, "decode": decoder}
        self._readiness = Readiness(
            {stage: ask_replica(handle) for stage, handle in handles.items() if handle is not None}
        )
        self._exchanges = Exchanges()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_http_app(self._service, self._readiness.missing)
        app.add_middleware(CountExchanges, exchanges=self._exchanges)
        return app

    async def generate(self, request: ImageRequest) -> ImageResult:
        """Draws a request. Raises a `ServiceError`."""
        with self._exchanges.one():
            return await self._service.generate(request, any_priority=True)

    async def stream(self, request: ImageRequest, partial_images: int = 0) -> AsyncIterator[StreamEvent]:
        """Draws a request and yields its events on the way; the `ImageResult` comes last.

        For `handle.options(stream=True).stream.remote(request)`. `partial_images`: previews of each image, 0 to 3.
        """
        with self._exchanges.one():
            async for event in self._service.stream(request, partial_images=partial_images, any_priority=True):
                yield event

    async def drain(self) -> int:
        """Takes in nothing that arrives from now on; returns how much of what was there before is still under way.

        What was there before is over HTTP and by handle whatever has arrived, drawn or not, until its answer is given.

        To be called on every replica, again and again until it is 0: `handle.broadcast("drain")`.
        """
        self._service.drain()
        return max(self._exchanges.drain(), self._service.admission.in_flight)

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica."""
        return {"images_in_flight": self._service.admission.in_flight}


async def _behind_the_proxies(config: AppConfig) -> AppConfig:
    """The configuration with what Serve's proxies really do: here it holds for every way of deploying."""
    options = await http_options()
    if options is None:
        logger.warning("Serve's HTTP options could not be read: http.loopback is taken to be false")
        return config.listening_on(None)
    behind = config.listening_on(options.host, options.request_timeout_s)
    if config.http.loopback and not behind.http.loopback:
        logger.warning("http.loopback is true, but HTTP is bound to %s: taken to be false", options.host)
    return behind
