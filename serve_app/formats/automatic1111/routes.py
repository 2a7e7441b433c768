"""webui's routes. It works on one request after another; this service on many at once: see `tasks.py`."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from serve_app.formats.answers import answered, json_response, read_body, read_request, with_headers, with_warnings
from serve_app.formats.automatic1111 import status as automatic1111_status
from serve_app.formats.automatic1111 import wire as automatic1111
from serve_app.formats.automatic1111.tasks import Bodies, Body
from serve_app.formats.openapi import PICTURE_ERRORS, answer, errors, json_body, or_null
from serve_app.request.schema import ImageResult
from serve_app.runtime.service import ImageService

ENVELOPES = {"/sdapi": automatic1111.encode_error, "/internal": automatic1111.encode_error}
_TAG = "AUTOMATIC1111"


def add_routes(app: FastAPI, service: ImageService) -> None:
    """`POST /sdapi/v1/txt2img` and what webui's clients call around it."""
    limits, names, facts = service.config.limits, service.config.model_names, service.facts
    bodies = Bodies(service.config.http.loopback is True)

    async def drawn(body: Body, request_id: str) -> list[ImageResult]:
        with bodies.under_way(body):
            body.task = asyncio.ensure_future(service.generate_all(body.requests, request_id, body.see))
            try:
                return await body.task
            except asyncio.CancelledError:
                caller = asyncio.current_task()
                if not body.tracker.interrupted or (caller is not None and caller.cancelling()):
                    raise
                return body.finished()

    async def picture(body: Body) -> str | None:
        if body.preview is None:
            return None
        return base64.b64encode(await asyncio.to_thread(service.preview, body.preview)).decode("ascii")

    @app.post("/sdapi/v1/txt2img", tags=[_TAG], summary="Draw pictures", openapi_extra=_TXT2IMG)
    async def txt2img(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            most, seed = limits.max_images_in_flight, secrets.randbits(32)
            asked = await read_request(
                request,
                service,
                limits.max_text_body_bytes,
                lambda body: automatic1111.decode(body, names, most, seed, facts),
            )
            results = await drawn(Body.of(asked.requests, asked.task_id), request_id)
            response = await json_response(lambda: automatic1111.encode(asked, results, names[0], facts))
            return with_headers(response, results, asked.warnings)

        return await answered(request, draw, automatic1111.encode_error)

    @app.get("/sdapi/v1/progress", tags=[_TAG], summary="How far a txt2img is", openapi_extra=_PROGRESS)
    async def progress(skip_current_image: bool = False, id_task: str | None = None) -> dict[str, Any]:
        body = bodies.find(id_task or None)
        if body is None:
            return automatic1111_status.encode_progress(None)
        preview = None if skip_current_image else await picture(body)
        return automatic1111_status.encode_progress(body.tracker.job(time.time()), preview)

    @app.post("/internal/progress", tags=[_TAG], summary="How far a task is", openapi_extra=_TASK_PROGRESS)
    async def task_progress(request: Request) -> Response:
        async def draw(request_id: str) -> Response:
            asked, warnings = await read_body(
                request, service.bodies, limits.max_text_body_bytes, automatic1111_status.decode_progress
            )
            body = bodies.find(asked.id_task or None)
            if body is None:
                known = automatic1111_status.encode_task_progress(None, bodies.is_finished(asked.id_task))
            else:
                number, preview = body.previews if body.previews else asked.id_live_preview, None
                if asked.live_preview and number != asked.id_live_preview:
                    preview = await picture(body)
                job = body.tracker.job(time.time())
                known = automatic1111_status.encode_task_progress(job, False, preview, number)
            return with_warnings(JSONResponse(known), warnings)

        return await answered(request, draw, automatic1111.encode_error)

    async def interrupt(request: Request, id_task: str | None = None) -> Response:
        async def draw(request_id: str) -> Response:
            bodies.interrupt(id_task or None)
            return JSONResponse(automatic1111_status.encode_interrupt())

        return await answered(request, draw, automatic1111.encode_error)

    for name, summary in (("interrupt", "End a txt2img"), ("skip", "The same: its pictures are drawn side by side")):
        app.post(f"/sdapi/v1/{name}", tags=[_TAG], summary=summary, name=name, openapi_extra=_INTERRUPT)(interrupt)

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
_TASK_PROGRESS: dict[str, Any] = {
    "requestBody": json_body(or_null(automatic1111_status.progress_schema())),
    "responses": answer("How far it is", {"application/json": automatic1111_status.TASK_PROGRESS_SCHEMA})
    | errors(automatic1111_status.ERROR_SCHEMA, *PICTURE_ERRORS),
}
_INTERRUPT: dict[str, Any] = {
    "responses": answer("It is ended", {"application/json": {"type": "object"}})
    | errors(automatic1111_status.ERROR_SCHEMA, 400, 404, 500),
}
