"""The ingress: every protocol's way in, and the order of the stages. Loads no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.config.settings import AppConfig
from serve_app.graph.calls import describe, remote_stages
from serve_app.graph.metrics import CallMetrics
from serve_app.graph.replica import check_options
from serve_app.http.app import build_http_app
from serve_app.request.resolve import ModelFacts, check_native_size
from serve_app.request.schema import ImageRequest, ImageResult, StreamEvent
from serve_app.runtime.service import ImageService


@serve.deployment
@serve.ingress()
class Ingress:
    """HTTP by the ASGI application, Python by `generate` and `stream`."""

    async def __init__(
        self,
        config: AppConfig,
        encoder: DeploymentHandle,
        base: DeploymentHandle,
        refiner: DeploymentHandle | None,
        decoder: DeploymentHandle,
    ) -> None:
        check_options(config)
        # Only the replicas read the checkpoints, so what must be known of them is asked of them.
        facts: dict[str, Any] = {"embedded_demo": config.base.path == "embedded:base"}
        for part in await asyncio.gather(
            *(describe(stage, config.checkpoints) for stage in (encoder, base, refiner, decoder) if stage is not None)
        ):
            facts |= part
        check_native_size(facts["native_size_px"], config.limits)
        stages = remote_stages(encoder, base, refiner, decoder, CallMetrics().lost)
        self._service = ImageService(config, ModelFacts(**facts), stages)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http_app(self._service)

    async def generate(self, request: ImageRequest) -> ImageResult:
        """Draws a request. Raises a `ServiceError`."""
        return await self._service.generate(request)

    async def stream(self, request: ImageRequest, partial_images: int = 0) -> AsyncIterator[StreamEvent]:
        """Draws a request and yields its events on the way; the `ImageResult` comes last.

        For `handle.options(stream=True).stream.remote(request)`. `partial_images`: previews of each image, 0 to 3.
        """
        async for event in self._service.stream(request, partial_images=partial_images):
            yield event

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica."""
        return {"images_in_flight": self._service.admission.in_flight}
