"""The ASGI application: the routes of every format over one service. Nothing here knows of Ray."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serve_app import __version__
from serve_app.formats.answers import Envelope, error_response
from serve_app.formats.automatic1111 import routes as automatic1111
from serve_app.formats.azure_ml import routes as azure_ml
from serve_app.formats.hugging_face import routes as hugging_face
from serve_app.formats.imagine import routes as imagine
from serve_app.formats.openai import routes as openai
from serve_app.formats.openai.wire import encode_error as encode_openai_error
from serve_app.formats.stability import routes as stability
from serve_app.http.head import BoundedHead
from serve_app.http.info import ServiceInfo, service_info
from serve_app.http.page import add_page
from serve_app.request.errors import MethodNotAllowed, RouteNotFound
from serve_app.runtime.service import ImageService

_FORMATS = (openai, azure_ml, hugging_face, automatic1111, stability, imagine)
# By the beginning of a path: a format's errors are in its own envelope. Elsewhere they are OpenAI's.
_ENVELOPES: dict[str, Envelope] = {
    **azure_ml.ENVELOPES,
    **hugging_face.ENVELOPES,
    **automatic1111.ENVELOPES,
    **stability.ENVELOPES,
}

DESCRIPTION = """\
Stable Diffusion XL as a Ray Serve graph: text encoders, base denoiser, refiner and VAE decoder are
separate deployments, and requests share every denoising step.

Every picture answer carries `X-Request-Id`, `Server-Timing` with the wait for the first step and the four stages,
and, where something of the request had no effect, `X-SDXL-Warnings`, a JSON list.
"""


def build_http_app(service: ImageService) -> FastAPI:
    """The ASGI application over a service."""
    app = FastAPI(title="sdxl-serve", version=__version__, description=DESCRIPTION)
    for format_routes in _FORMATS:
        format_routes.add_routes(app, service)

    @app.get("/v1/sdxl/info", tags=["operations"], summary="What is served, and within which limits")
    async def info() -> ServiceInfo:
        return service_info(service.config, service.facts)

    @app.get("/health", tags=["operations"], summary="Alive: the ingress is up")
    async def health() -> dict[str, Any]:
        model = service.config.model_names[0]
        return {"status": "ok", "model": model, "images_in_flight": service.admission.in_flight}

    add_page(app)
    app.add_middleware(BoundedHead, envelope_of=_envelope)

    @app.exception_handler(HTTPException)
    async def unmatched(request: Request, error: HTTPException) -> Response:
        kind = MethodNotAllowed if error.status_code == 405 else RouteNotFound
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))  # Ray's route_prefix
        what = f"{request.method} {request.url.path}"
        message = f"{what}: method not allowed" if error.status_code == 405 else f"{what}: no such route; see /docs"
        return error_response(kind(message), _envelope(path), error.headers)

    return app


def _envelope(path: str) -> Envelope:
    """The error envelope of the format that a path belongs to."""
    return next((envelope for start, envelope in _ENVELOPES.items() if path.startswith(start)), encode_openai_error)
