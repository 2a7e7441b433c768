"""webui's routes. It works on one request after another; this service on many at once.

`progress`, `interrupt` and `skip` name no request: they mean the oldest txt2img that this ingress replica is at. With
several ingress replicas, a client reaches any of them.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from serve_app.formats.answers import answered, decoded, json_response, read_body, with_headers
from serve_app.formats.automatic1111 import status as automatic1111_status
from serve_app.formats.automatic1111 import wire as automatic1111
from serve_app.formats.openapi import PICTURE_ERRORS, answer, errors, json_body, or_null
from serve_app.request.schema import GeneratedImage, ImageReady, ImageRequest, ImageResult
from serve_app.runtime.events import Event
from serve_app.runtime.pipeline import LatentPreview
from serve_app.runtime.service import ImageService

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Floats

ENVELOPES = {"/sdapi": automatic1111.encode_error, "/internal": automatic1111.encode_error}
_TAG = "AUTOMATIC1111"


@dataclass
class Body:
    """One txt2img body on its way: how far it is, and what of it is finished."""

    requests: list[ImageRequest]
    tracker: automatic1111_status.Tracker
    task: asyncio.Future[list[ImageResult]] | None = None
    preview: Floats | None = None  # the latest: (4, H/8, W/8)
    _ready: dict[tuple[int, int], GeneratedImage] = field(default_factory=dict)

    @staticmethod
    def of(requests: list[ImageRequest]) -> Body:
        images = sum(request.n for request in requests)
        return Body(requests, automatic1111_status.Tracker(images, requests[0].num_inference_steps, time.time()))

    def see(self, row: int, event: Event) -> None:
        if isinstance(event, LatentPreview):
            self.preview = event.latents
            return
        if isinstance(event, ImageReady):
            self._ready[row, event.image] = event.picture
        self.tracker.see(event, sum(request.n for request in self.requests[:row]))

    def interrupt(self) -> None:
        if self.task is not None:
            self.tracker.interrupted = True
            self.task.cancel()

    def finished(self) -> list[ImageResult]:
        """The pictures that were done when it was interrupted."""
        now, total = int(time.time()), sum(request.n for request in self.requests)
        warnings = [f"interrupted: {len(self._ready)} of {total} pictures were finished"]
        return [
            ImageResult([self._ready[key] for key in sorted(self._ready) if key[0] == row], warnings, created=now)
            for row in range(len(self.requests))
        ]


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /sdapi/v1/txt2img` and what webui's clients call around it."""
    limits, names, facts = service.config.limits, service.config.model_names, service.facts
    bodies: list[Body] = []

    async def drawn(body: Body, request_id: str) -> list[ImageResult]:
        body.task = asyncio.ensure_future(service.generate_all(body.requests, request_id, body.see))
        bodies.append(body)
        try:
            return await body.task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if not body.tracker.interrupted or (caller is not None and caller.cancelling()):
                raise
            return body.finished()
        finally:
            bodies.remove(body)

    @app.post("/sdapi/v1/txt2img", tags=[_TAG], summary="Draw pictures", openapi_extra=_TXT2IMG)
    async def txt2img(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            content = await read_body(request, limits.max_body_bytes)
            most, seed = limits.max_images_in_flight, secrets.randbits(32)
            asked = await decoded(
                content,
                lambda body: automatic1111.decode(body, names, most, seed, facts.refined, facts.trajectory),
            )
            results = await drawn(Body.of(asked.requests), request_id)
            response = await json_response(
                lambda: automatic1111.encode(asked, results, names[0], facts.refined, facts.trajectory)
            )
            return with_headers(response, results, asked.warnings)

        return await answered(request, draw, automatic1111.encode_error)

    @app.get("/sdapi/v1/progress", tags=[_TAG], summary="How far the oldest txt2img is", openapi_extra=_PROGRESS)
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        if not bodies:
            return automatic1111_status.encode_progress(None)
        body, picture = bodies[0], None
        if body.preview is not None and not skip_current_image:
            picture = base64.b64encode(await asyncio.to_thread(service.preview, body.preview)).decode("ascii")
        return automatic1111_status.encode_progress(body.tracker.job(time.time()), picture)

    async def interrupt() -> dict[str, Any]:
        for body in itertools.islice(bodies, 1):
            body.interrupt()
        return automatic1111_status.encode_interrupt()

    app.post("/sdapi/v1/interrupt", tags=[_TAG], summary="End the oldest txt2img")(interrupt)
    app.post("/sdapi/v1/skip", tags=[_TAG], summary="The same: its pictures are drawn side by side")(interrupt)

    answers = {
        "/sdapi/v1/sd-models": automatic1111_status.encode_models(names),
        "/sdapi/v1/samplers": automatic1111_status.encode_samplers(),
        "/sdapi/v1/schedulers": automatic1111_status.encode_schedulers(),
        "/sdapi/v1/options": automatic1111_status.encode_options(names),
        "/sdapi/v1/cmd-flags": automatic1111_status.encode_cmd_flags(),
        "/internal/ping": automatic1111_status.encode_ping(),
    }
    for path, content in answers.items():
        _add_constant(app, path, content)


def _add_constant(app: FastAPI, path: str, content: Any) -> None:
    async def read() -> Any:
        return content

    name = path.rsplit("/", 1)[-1].replace("-", "_")
    app.get(path, tags=[_TAG], summary=f"webui's {name}", name=name)(read)


_TXT2IMG: dict[str, Any] = {
    "requestBody": json_body(or_null(automatic1111.txt2img_schema())),
    "responses": answer("The pictures", {"application/json": automatic1111_status.PICTURES_SCHEMA})
    | errors(automatic1111_status.ERROR_SCHEMA, *PICTURE_ERRORS, 404),
}
_PROGRESS: dict[str, Any] = {
    "responses": answer("How far it is", {"application/json": automatic1111_status.PROGRESS_SCHEMA})
}
