"""The ASGI application: the routes of every format over one service. Nothing here knows of Ray."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serve_app import __version__
from serve_app.errors import MethodNotAllowed, RouteNotFound
from serve_app.protocols import azure_ml as azure_ml_format
from serve_app.protocols import openai as openai_format
from serve_app.routes import azure_ml, imagine, openai
from serve_app.routes.answers import Envelope, error_response
from serve_app.service import ImageService

_FORMATS = (openai, azure_ml, imagine)
# Where a path has a format of its own, so have its errors; elsewhere they are OpenAI's.
_ENVELOPES: dict[str, Envelope] = {"/score": azure_ml_format.encode_error}

DESCRIPTION = """\
Stable Diffusion XL as a Ray Serve graph: text encoders, base denoiser, refiner and VAE decoder are
separate deployments, and requests share every denoising step.

Every picture answer carries `X-Request-Id`, `Server-Timing` with the four stages, and, where something of
the request had no effect, `X-SDXL-Warnings`, a JSON list.
"""


def build_http_app(service: ImageService) -> FastAPI:
    """The ASGI application over a service."""
    app = FastAPI(title="sdxl-serve", version=__version__, description=DESCRIPTION)
    for format_routes in _FORMATS:
        format_routes.add_routes(app, service)

    @app.get("/health", tags=["operations"], summary="Alive: the ingress is up")
    async def health() -> dict[str, Any]:
        model = service.config.model_names[0]
        return {"status": "ok", "model": model, "images_in_flight": service.admission.in_flight}

    @app.exception_handler(HTTPException)
    async def unmatched(request: Request, error: HTTPException) -> Response:
        kind = MethodNotAllowed if error.status_code == 405 else RouteNotFound
        what = f"{request.method} {request.url.path}"
        message = f"{what}: method not allowed" if error.status_code == 405 else f"{what}: no such route; see /docs"
        envelope = next((e for path, e in _ENVELOPES.items() if request.url.path.startswith(path)), None)
        return error_response(kind(message), envelope or openai_format.encode_error, error.headers)

    return app
