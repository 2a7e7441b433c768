"""What every way in shares: admission, defaults, the pipeline, picture files.

HTTP routes and the Python handle both end here. It runs on the ingress's event loop and loads no torch.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from serve_app.config.settings import AppConfig
from serve_app.pictures import infotext
from serve_app.pictures.files import encode_image, encode_preview
from serve_app.request.errors import InvalidRequest, RequestKillsReplica
from serve_app.request.facts import ModelFacts
from serve_app.request.resolve import ResolvedRequest, check_priority, parameters, resolve
from serve_app.request.schema import (
    MAX_PARTIAL_IMAGES,
    Accepted,
    GeneratedImage,
    ImageReady,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StreamEvent,
)
from serve_app.runtime.admission import Admission, Bodies
from serve_app.runtime.cost import cost_of
from serve_app.runtime.events import Event, EventStream
from serve_app.runtime.pipeline import LatentPreview, Listener, Stages, draw
from serve_app.runtime.quarantine import Quarantine

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats

_ROWS_AT_ONCE = 32
# Of all bodies that are being read and decoded at once; one of the largest always fits.
_MAX_BYTES_READ = 64 * 2**20


class ImageService:
    """Turns requests into results over the four stages.

    `any_priority`: the caller is the operator's own program, whom `limits.max_priority` does not bind.
    """

    def __init__(self, config: AppConfig, facts: ModelFacts, stages: Stages) -> None:
        self.config = config
        self.facts = facts
        self._stages = stages
        self.admission = Admission(config.limits.max_images_in_flight, time.monotonic)
        limits = config.limits
        self.bodies = Bodies(max(_MAX_BYTES_READ, limits.max_body_bytes, limits.max_text_body_bytes))
        self._quarantine = Quarantine(time.monotonic)

    @property
    def draining(self) -> bool:
        """Whether the service ends, and takes in nothing new."""
        return self.admission.draining

    def drain(self) -> None:
        """From now on new requests are refused (`Draining`); those that have arrived are finished."""
        self.admission.drain()

    def check(self, request: ImageRequest) -> None:
        """Raises what is wrong with a request, as `generate` would, and draws nothing."""
        self._resolve(request, None, any_priority=False)

    async def generate(
        self, request: ImageRequest, request_id: str | None = None, *, any_priority: bool = False
    ) -> ImageResult:
        """Draws one request. Raises a `ServiceError`; a cancelled caller frees its slots in every stage."""
        (result,) = await self.generate_all([request], request_id, any_priority=any_priority)
        return result

    async def generate_all(
        self,
        requests: Sequence[ImageRequest],
        request_id: str | None = None,
        on_event: Callable[[int, Event], None] | None = None,
        *,
        any_priority: bool = False,
    ) -> list[ImageResult]:
        """Draws several requests that came as one: all are taken in, or none is.

        `on_event(row, event)`, where given, is called with every event of each request, previews among them.
        """
        request_id = request_id or uuid.uuid4().hex
        resolved = []
        for row, request in enumerate(requests):
            place = f"{request_id}-{row}" if row else request_id
            resolved.append(self._resolve(request, place, any_priority))
            if row % _ROWS_AT_ONCE == _ROWS_AT_ONCE - 1:
                await asyncio.sleep(0)  # nobody else waits for the rows of a large body
        images, cost = sum(one.n for one in resolved), sum(cost_of(one, self.facts).total for one in resolved)
        with self.admission.hold(images, cost):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._draw(request, *self._listening(on_event, row)))
                        for row, request in enumerate(resolved)
                    ]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _listening(
        self, on_event: Callable[[int, Event], None] | None, row: int
    ) -> tuple[Listener | None, Callable[[ImageReady], None] | None]:
        if on_event is None:
            return None, None
        tell = functools.partial(on_event, row)
        return Listener(tell, MAX_PARTIAL_IMAGES if self.facts.decoder.preview_map else 0), tell

    def preview(self, latents: Floats) -> bytes:
        """A rough picture of latents, (4, H/8, W/8), as a PNG: for those of an event, where there is a map."""
        assert self.facts.decoder.preview_map is not None
        _, height, width = latents.shape
        return encode_preview(latents, self.facts.decoder.preview_map, width * 8, height * 8, "png")

    async def stream(
        self,
        request: ImageRequest,
        request_id: str | None = None,
        partial_images: int = 0,
        progress: bool = True,
        *,
        any_priority: bool = False,
    ) -> AsyncGenerator[StreamEvent, None]:
        """Draws one request and yields its events on the way; the result comes last.

        `partial_images`: previews of each image, 0 to 3; fewer come where the steps are fewer.
        Without `progress` and previews the denoisers report nothing.
        The first event is `Accepted`: what is wrong with a request is raised before. Progress is told about ten
        times a second and the last of each stage always (`runtime/events.py`). Who reads slowly holds up nobody:
        the request is in flight until it is drawn, not until it is read.
        """
        if not 0 <= partial_images <= MAX_PARTIAL_IMAGES:
            raise InvalidRequest(
                f"partial_images: {partial_images} is outside 0 to {MAX_PARTIAL_IMAGES}", param="partial_images"
            )
        resolved = self._resolve(request, request_id, any_priority)
        if partial_images and self.facts.decoder.preview_map is None:
            warning = "partial_images has no effect: this checkpoint's VAE gives no previews"
            resolved = replace(resolved, warnings=(*resolved.warnings, warning))
            partial_images = 0
        events = EventStream()

        def tell(event: Event) -> None:
            if progress or not isinstance(event, Progress):
                events.put(event)

        release = self.admission.take_in(resolved.n, cost_of(resolved, self.facts).total)
        listener = Listener(tell, partial_images) if progress or partial_images else None
        tell(Progress("encode"))
        task = asyncio.create_task(self._draw(resolved, listener, tell))

        def drawn(task: asyncio.Task[ImageResult]) -> None:
            release(not task.cancelled() and task.exception() is None)
            events.close()

        task.add_done_callback(drawn)
        try:
            yield Accepted(resolved.request_id, resolved.seed, resolved.warnings)
            async for event in events:
                if isinstance(event, LatentPreview):
                    yield await asyncio.to_thread(self._preview, event, resolved)
                else:
                    yield event
            yield await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _resolve(self, request: ImageRequest, request_id: str | None, any_priority: bool) -> ResolvedRequest:
        if not any_priority:
            check_priority(request, self.config.limits)
        resolved = resolve(request, self.facts, self.config.limits, request_id)
        self._quarantine.check(resolved)
        return resolved

    def _encode_file(self, pixels: Bytes, request: ResolvedRequest, index: int) -> bytes:
        fields = parameters(request, index)
        name, base = self.config.model_names[0], self.facts.base
        texts = {infotext.PNG_KEY: infotext.infotext(fields, name, base.native_scheduler, base.noise_schedule)}
        return encode_image(pixels, request.output_format, request.quality, fields, texts)

    def _preview(self, event: LatentPreview, request: ResolvedRequest) -> PartialImage:
        assert self.facts.decoder.preview_map is not None
        data = encode_preview(
            event.latents, self.facts.decoder.preview_map, request.width, request.height, request.output_format
        )
        return PartialImage(event.image, event.index, data, request.output_format, request.width, request.height)

    async def _draw(
        self,
        request: ResolvedRequest,
        listener: Listener | None = None,
        on_ready: Callable[[ImageReady], None] | None = None,
    ) -> ImageResult:
        async def deliver(index: int, pixels: Bytes) -> GeneratedImage:
            data = await asyncio.to_thread(self._encode_file, pixels, request, index)
            picture = GeneratedImage(data, request.seed + index, request.output_format, request.width, request.height)
            if on_ready is not None:
                on_ready(ImageReady(index, picture))
            return picture

        try:
            drawing = await draw(request, self._stages, deliver, listener)
        except RequestKillsReplica:
            self._quarantine.add(request)
            raise
        warnings = [*request.warnings, *drawing.warnings]
        return ImageResult(
            drawing.images, warnings, drawing.timings, request.request_id, int(time.time()), drawing.text_tokens
        )
