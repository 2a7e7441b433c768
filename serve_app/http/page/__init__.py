"""The page at `/`: static files of this folder, without a build step or an outside address.

It holds no state in the service: a drawing is one streaming request to `POST /v1/images/generations`, so any
number of ingress replicas serve it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.exceptions import HTTPException

from serve_app.http.conventions import BARE_PREFIX

_FOLDER = Path(__file__).parent
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # Nothing but this service's own files and answers; pictures are made in the page, as blobs.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for anew: after an update no old part meets a new one
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """The page's files by name; `index.html` is the page."""
    files = {}
    for path in sorted(_FOLDER.iterdir()):
        if path.suffix in _MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            files[path.name] = PageFile(content, _MEDIA_TYPES[path.suffix], etag)
    return files


def add_page(app: FastAPI) -> None:
    """Adds `GET /`, the page to whoever asks for HTML and `Healthy` to everybody else, and the page's files."""
    files = read_page()

    @app.get("/", tags=["operations"], summary="The page, or alive", response_class=Response, openapi_extra=_ROOT)
    async def root(request: Request) -> Response:
        response: Response
        if "text/html" not in request.headers.get("accept", "").lower():
            response = PlainTextResponse("Healthy")
        elif request.scope.get(BARE_PREFIX):  # the page's addresses are relative to its own, which ends in a slash
            response = RedirectResponse(f"{request.scope['root_path']}/")
        else:
            response = file_answer(request, files["index.html"], _HEADERS)
        response.headers["Vary"] = "Accept"
        return response

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return file_answer(request, files[name], _HEADERS)


def file_answer(request: Request, file: PageFile, headers: dict[str, str]) -> Response:
    """The file, or 304 for whoever has it."""
    headers = headers | {"ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


_ROOT: dict[str, Any] = {
    "responses": {
        "200": {
            "description": "The page where the request accepts text/html; otherwise the word Healthy",
            "content": {
                "text/plain": {"schema": {"type": "string"}, "example": "Healthy"},
                "text/html": {"schema": {"type": "string"}},
            },
        }
    }
}
