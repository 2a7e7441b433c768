"""The ASGI application: the routes of every format over one service. Nothing here knows of Ray."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve_app import __version__
from serve_app.formats.automatic1111 import routes as automatic1111
from serve_app.formats.azure_ml import routes as azure_ml
from serve_app.formats.hugging_face import routes as hugging_face
from serve_app.formats.imagine import routes as imagine
from serve_app.formats.openai import routes as openai
from serve_app.formats.openapi import errors
from serve_app.formats.stability import routes as stability
from serve_app.http.conventions import Conventions
from serve_app.http.documents import add_docs
from serve_app.http.envelopes import envelope_of, error_answer
from serve_app.http.guard import Cors, OriginGuard, Preflights, RequestGuard
from serve_app.http.head import BoundedHead
from serve_app.http.info import ServiceInfo, service_info
from serve_app.http.page import add_page
from serve_app.request.errors import (
    Draining,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotReady,
    RouteNotFound,
    ServiceError,
)
from serve_app.runtime.service import ImageService

# Gives the stages that have no replica which answers; none is ready.
Missing = Callable[[], Awaitable[Sequence[str]]]

_FORMATS = (openai, azure_ml, hugging_face, automatic1111, stability, imagine)
_READY_RETRY_S = 5.0

DESCRIPTION = """\
Stable Diffusion XL as a Ray Serve graph: text encoders, base denoiser, refiner and VAE decoder are
separate deployments, and requests share every denoising step.

Every picture answer carries `X-Request-Id`, `Server-Timing` with the wait for the first step and the four stages,
and, where something of the request had no effect, `X-SDXL-Warnings`, a JSON list.
"""


async def _none_missing() -> Sequence[str]:
    return ()


def build_http_app(service: ImageService, missing: Missing = _none_missing) -> FastAPI:
    """The ASGI application over a service. `missing` is what `/ready` asks."""
    config = service.config
    app = FastAPI(
        title="sdxl-serve",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for format_routes in _FORMATS:
        format_routes.add_routes(app, service)
    _add_operations(app, service, missing)
    add_page(app)
    add_docs(app)
    _add_errors(app)
    # From the inside to the outside.
    app.add_middleware(RequestGuard, config=config.http, limits=config.limits, routes=lambda: app.routes)
    if config.http.cors_origins:
        app.add_middleware(Preflights, config=config.http)
    app.add_middleware(OriginGuard, config=config.http)
    app.add_middleware(BoundedHead)
    app.add_middleware(Conventions)
    if config.http.cors_origins:
        app.add_middleware(Cors, config=config.http)
    return app


def _add_operations(app: FastAPI, service: ImageService, missing: Missing) -> None:
    @app.get("/v1/sdxl/info", tags=["operations"], summary="What is served, and within which limits")
    async def info() -> ServiceInfo:
        return service_info(service.config, service.facts)

    @app.get("/health", tags=["operations"], summary="Alive: the ingress is up, whatever the stages do")
    async def health() -> dict[str, Any]:
        model = service.config.model_names[0]
        return {"status": "ok", "model": model, "images_in_flight": service.admission.in_flight}

    unready = {"responses": errors(envelope_of("/ready")[1], 503)}

    @app.get("/ready", tags=["operations"], summary="Every stage has a replica that answers", openapi_extra=unready)
    async def ready() -> dict[str, str]:
        if service.draining:
            raise Draining("the service is shutting down", retry_after_s=_READY_RETRY_S)
        if stages := await missing():
            raise NotReady(f"no replica answers for: {', '.join(stages)}", retry_after_s=_READY_RETRY_S)
        return {"status": "ready"}


def _add_errors(app: FastAPI) -> None:
    """Whatever the framework itself refuses is refused in the envelope of the format that was asked."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            allowed = {"Allow": ", ".join(_methods(app, request))}
            return error_answer(request.scope, MethodNotAllowed(f"{what}: method not allowed"), allowed)
        if error.status_code == 404:
            return error_answer(request.scope, RouteNotFound(f"{what}: no such route; see /docs"), error.headers)
        kind = InvalidRequest if error.status_code < 500 else InternalError
        answer = error_answer(request.scope, kind(str(error.detail)), error.headers)
        answer.status_code = error.status_code
        return answer

    @app.exception_handler(RequestValidationError)
    async def wrong_value(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name, reason = str(first["loc"][-1]), str(first["msg"])
        return error_answer(request.scope, InvalidRequest(f"{name}: {reason[:1].lower()}{reason[1:]}", param=name))

    @app.exception_handler(ServiceError)
    async def raised(request: Request, error: ServiceError) -> Response:
        return error_answer(request.scope, error)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What a path takes, by all its routes. HEAD goes with GET."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found | ({"HEAD"} if "GET" in found else set()))
