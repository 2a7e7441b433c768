"""`/docs` and the OpenAPI description that it shows: Swagger UI, from this service alone.

Swagger UI's own files come with the package `fastapi-offline`; FastAPI's page would fetch them from a CDN.
"""

from __future__ import annotations

import hashlib
import html
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from serve_app.formats.openapi import BODY_ERRORS, COMMON_ERRORS, errors
from serve_app.http.envelopes import envelope_of
from serve_app.http.page import PageFile, file_answer

_HEADERS = {
    # Swagger UI writes styles into its elements and draws its icons from data: addresses.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_SWAGGER_UI = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdxl-serve: the HTTP API</title>
<link rel="icon" href="{root}/page/icon.svg">
<link rel="stylesheet" href="{root}/docs/swagger-ui.css">
<script src="{root}/docs/swagger-ui-bundle.js" defer></script>
<script src="{root}/docs/start.js" data-openapi="{root}/openapi.json" defer></script>
</head>
<body><div id="swagger-ui"></div></body>
</html>
"""


def add_docs(app: FastAPI) -> None:
    """Adds `GET /docs` and its files, and completes the application's description."""
    files = _read_files()

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        content = _PAGE.format(root=html.escape(request.scope.get("root_path", ""))).encode()
        return file_answer(request, _file(content, "text/html; charset=utf-8"), _HEADERS)

    @app.get("/docs/{name}", include_in_schema=False)
    async def docs_file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return file_answer(request, files[name], _HEADERS)

    app.docs_url = "/docs"  # Ray's dashboard links there
    describe = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(describe())
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    """Describes what any route may answer: the errors that routes themselves know nothing of."""
    for path, operations in document["paths"].items():
        _, schema = envelope_of(path)
        for operation in operations.values():
            answers = operation["responses"]
            answers.pop("422", None)  # FastAPI's own for a wrong value in a query or path: it is a 400 here
            common = errors(schema, *COMMON_ERRORS, *(BODY_ERRORS if "requestBody" in operation else ()))
            operation["responses"] = dict(sorted((common | answers).items()))
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document


def _read_files() -> dict[str, PageFile]:
    package = find_spec("fastapi_offline")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("fastapi-offline is not installed: it has the files of /docs")
    static = Path(package.submodule_search_locations[0]) / "static"
    files = {name: _file((static / name).read_bytes(), media_type) for name, media_type in _SWAGGER_UI.items()}
    start = (Path(__file__).parent / "start.js").read_bytes()
    return files | {"start.js": _file(start, _SWAGGER_UI["swagger-ui-bundle.js"])}


def _file(content: bytes, media_type: str) -> PageFile:
    return PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
