"""What every way in shares: admission, defaults, the pipeline, picture files.

HTTP routes and the Python handle both end here. It runs on the ingress's event loop and loads no torch.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from serve_app.admission import Admission
from serve_app.config import AppConfig
from serve_app.images import encode_image
from serve_app.pipeline import OnProgress, Stages, draw
from serve_app.resolve import ModelFacts, ResolvedRequest, parameters, resolve
from serve_app.schema import GeneratedImage, ImageRequest, ImageResult, Progress


class ImageService:
    """Turns requests into results over the four stages."""

    def __init__(self, config: AppConfig, facts: ModelFacts, stages: Stages) -> None:
        self.config = config
        self.facts = facts
        self._stages = stages
        self.admission = Admission(config.limits.max_images_in_flight, time.monotonic)

    async def generate(
        self, request: ImageRequest, request_id: str | None = None, on_progress: OnProgress | None = None
    ) -> ImageResult:
        """Draws one request. Raises a `ServiceError`; a cancelled caller frees its slots in every stage."""
        (result,) = await self.generate_all([request], request_id, on_progress)
        return result

    async def generate_all(
        self,
        requests: Sequence[ImageRequest],
        request_id: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[ImageResult]:
        """Draws several requests that came as one: all are taken in, or none is."""
        request_id = request_id or uuid.uuid4().hex
        resolved = [
            resolve(request, self.facts, self.config.limits, f"{request_id}-{row}" if row else request_id)
            for row, request in enumerate(requests)
        ]
        with self.admission.hold(sum(request.n for request in resolved)):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._draw(request, on_progress)) for request in resolved]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def stream(
        self, request: ImageRequest, request_id: str | None = None
    ) -> AsyncIterator[Progress | ImageResult]:
        """Draws one request and yields its progress on the way; the result comes last."""
        events: asyncio.Queue[Progress | None] = asyncio.Queue()
        task = asyncio.create_task(self.generate(request, request_id, events.put_nowait))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield await task
        finally:
            task.cancel()

    async def _draw(self, request: ResolvedRequest, on_progress: OnProgress | None) -> ImageResult:
        drawing = await draw(request, self._stages, on_progress)
        files = await asyncio.gather(
            *(
                asyncio.to_thread(
                    encode_image, pixels, request.output_format, request.quality, parameters(request, index)
                )
                for index, pixels in enumerate(drawing.pixels)
            )
        )
        images = [
            GeneratedImage(data, request.seed + index, request.output_format, request.width, request.height)
            for index, data in enumerate(files)
        ]
        warnings = [*request.warnings, *drawing.warnings]
        return ImageResult(images, warnings, drawing.timings, request.request_id, int(time.time()))
