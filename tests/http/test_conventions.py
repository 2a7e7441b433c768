"""What holds for every answer: HEAD, slashes, ids, headers, envelopes; and `/ready`, `/health`, draining."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from serve_app.http.app import build_http_app
from tests.fakes import FakeStages, service
from tests.http.browser import a_page
from tests.http.test_guard import BODIES, GENERATIONS, IMAGINE, INTERRUPT, LINES, SCORE, STABILITY, a_client, line
from tests.http.web_server import serving

HTML = {"Accept": "text/html"}


def get_paths() -> list[str]:
    """Every GET route of the application, with something in its place where it names something."""
    app = build_http_app(service(FakeStages()))
    paths = [route.path for route in app.routes if "GET" in (getattr(route, "methods", None) or ())]  # type: ignore[attr-defined]
    filled = {
        "/v1/models/{name:path}": "/v1/models/sdxl",
        "/page/{name}": "/page/main.js",
        "/docs/{name}": "/docs/start.js",
    }
    return [filled.get(path, path) for path in paths]


GETS = get_paths()


def test_the_list_of_routes_is_one() -> None:
    assert {"/", "/health", "/ready", "/imagine", "/v1/models/sdxl", "/sdapi/v1/progress", "/docs"} <= set(GETS)
    assert len(GETS) > 15 and not any("{" in path for path in GETS)


# HEAD


@pytest.mark.parametrize("path", GETS)
async def test_head_is_get_without_a_body(path: str) -> None:
    if path == "/imagine":
        return  # below
    async with a_client(FakeStages()) as client:
        for headers in ({}, HTML):
            got, head = [await client.request(method, path, headers=headers) for method in ("GET", "HEAD")]
            assert head.status_code == got.status_code == 200 and head.content == b"" and got.content
            for answer in (got, head):
                answer.headers.pop("x-request-id")
            assert head.headers == got.headers and head.headers["content-length"] == str(len(got.content))


async def test_head_of_a_picture_checks_the_request_and_draws_nothing() -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        head = await client.head(f"{IMAGINE}&output_format=webp&cat=1")
        assert (head.status_code, head.headers["content-type"], head.content) == (200, "image/webp", b"")
        assert "content-length" not in head.headers and "cat" in head.headers["x-sdxl-warnings"]
        assert (await client.head("/imagine")).status_code == 400
        assert (await client.head(f"{IMAGINE}&width=4096&height=4096")).status_code == 400
    assert fake.calls == []


async def test_head_of_what_is_not_there() -> None:
    async with a_client(FakeStages()) as client:
        for path, status in {"/nothing": 404, GENERATIONS: 405, "/v1/models/none": 404}.items():
            answer = await client.head(path)
            assert (answer.status_code, answer.content) == (status, b"")
            assert int(answer.headers["content-length"]) > 0


# Slashes


@pytest.mark.parametrize("path", GETS)
async def test_a_slash_at_the_end_changes_nothing(path: str) -> None:
    query = "?prompt=p&seed=1" if path == "/imagine" else ""
    for root in ("", "/img"):
        async with a_client(FakeStages(), root_path=root) as client:
            plain, slashed, more = [
                await client.get(f"{root}{path.rstrip('/')}{end}{query}", headers=HTML if path == "/docs" else {})
                for end in ("", "/", "//")
            ]
        assert plain.status_code == slashed.status_code == more.status_code == 200
        if "timestamp" not in plain.text and "job" not in plain.text:
            assert plain.content == slashed.content == more.content


async def test_of_posts_and_unknown_names_as_well() -> None:
    async with a_client(FakeStages()) as client:
        for path, body in BODIES.items():
            assert (await client.post(f"{path}/", json=body)).status_code == 200
            assert (await client.post(f"{path}/", content=b"{")).status_code == 415
        for path in ("/v1/models/none", "/nothing", "/page/none.js", "/v1/images"):
            plain, slashed = await client.get(path), await client.get(f"{path}/")
            assert (plain.status_code, plain.json()) == (404, slashed.json())


# One id


@pytest.mark.parametrize("path", [*BODIES, *GETS, "/nothing"])
async def test_every_answer_has_an_id(path: str) -> None:
    async with a_client(FakeStages()) as client:
        method = "POST" if path in BODIES else "GET"
        ids = {(await client.request(method, path, json=BODIES.get(path))).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize("path", [path for path in BODIES if path != INTERRUPT])
async def test_the_id_of_a_fault_is_one_in_answer_message_and_log(path: str, caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeStages(fail={"denoise": RuntimeError("secret")})
    async with a_client(fake) as client:
        for given in (None, "mine 1;x"):
            with caplog.at_level(logging.ERROR, logger="ray.serve"):
                caplog.clear()
                headers = {} if given is None else {"x-request-id": given}
                answer = await client.post(path, json=BODIES[path], headers=headers)
            request_id = given or answer.headers["x-request-id"]
            assert line(path, answer) == f"internal error; the log has it under request {request_id}"
            assert f"request {request_id} failed" in caplog.text and "secret" not in answer.text
            if path == STABILITY:
                assert answer.json()["id"] == request_id


# Headers


@pytest.mark.parametrize("path", [*BODIES, *GETS, "/nothing"])
async def test_no_answer_is_kept_or_taken_for_another_type(path: str) -> None:
    async with a_client(FakeStages()) as client:
        if path == "/imagine":
            path = IMAGINE
        answer = await client.request("POST" if path in BODIES else "GET", path, json=BODIES.get(path), headers=HTML)
        assert answer.headers["x-content-type-options"] == "nosniff"
        a_file = path in ("/", "/docs") or path.startswith(("/page/", "/docs/"))
        assert answer.headers["cache-control"] == ("no-cache" if a_file else "no-store")
        for refused in ({"Host": "evil.example"}, {"x-request-timeout-seconds": "0"}):
            answer = await client.get(path, headers=refused)
            assert (answer.headers["x-content-type-options"], answer.headers["cache-control"]) == (
                "nosniff",
                "no-store",
            )


# Envelopes


STATUSES = (400, 403, 404, 405, 408, 411, 413, 415, 417, 418, 429, 500, 501, 503)


@pytest.mark.parametrize("path", BODIES)
async def test_whatever_the_framework_raises_is_in_the_formats_envelope(path: str) -> None:
    """An HTTPException of any status, from a route that a format will have."""
    app: FastAPI = build_http_app(service(FakeStages()))
    beside = f"{path}/raise" if path != INTERRUPT else "/sdapi/v1/raise"

    @app.get(f"{beside}/{{status}}")
    async def raises(status: int) -> None:
        raise HTTPException(status, "one line", headers={"Retry-After": "7"} if status in (429, 503) else None)

    @app.get(f"{beside}-a-fault")
    async def fails() -> None:
        raise RuntimeError("secret")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        for status in STATUSES:
            answer = await client.get(f"{beside}/{status}")
            assert answer.status_code == status
            assert line(path, answer)
            assert (answer.headers.get("retry-after") == "7") is (status in (429, 503))
        wrong = await client.get(f"{beside}/none")
        assert wrong.status_code == 400 and line(path, wrong).startswith("status: ")
        fault = await client.get(f"{beside}-a-fault")
        assert fault.status_code == 500 and "secret" not in fault.text
        assert line(path, fault).startswith("internal error")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", GENERATIONS, "POST"),
        ("GET", SCORE, "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/sdxl", "GET, HEAD"),
        ("POST", "/imagine/", "GET, HEAD"),
        ("PATCH", "/hugging-face/text-to-image", "POST"),
        ("OPTIONS", "/sdapi/v1/txt2img", "POST"),
        ("TRACE", STABILITY, "POST"),
        ("POST", "/page/main.js", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_names_the_right_ones(method: str, path: str, allowed: str) -> None:
    async with a_client(FakeStages()) as client:
        answer = await client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if path in LINES:
        assert line(path, answer) == f"{method} {path}: method not allowed"


async def test_a_wrong_value_in_a_query_is_one_line() -> None:
    async with a_client(FakeStages()) as client:
        answer = await client.get("/sdapi/v1/progress?skip_current_image=maybe")
    assert answer.status_code == 400 and line(INTERRUPT, answer).startswith("skip_current_image: ")


# Ready, alive, draining


class Stages:
    def __init__(self, *missing: str) -> None:
        self.without: Sequence[str] = missing

    async def missing(self) -> Sequence[str]:
        return self.without


async def test_ready_is_said_only_where_every_stage_answers() -> None:
    stages, images = Stages("denoise", "refine"), service(FakeStages())
    app = build_http_app(images, stages.missing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        answer = await client.get("/ready")
        assert answer.status_code == 503 and "denoise, refine" in line("/ready", answer)
        assert answer.json()["error"]["code"] == "not_ready" and int(answer.headers["retry-after"]) > 0
        assert (await client.get("/health")).status_code == 200, "alive all the same"
        stages.without = ()
        assert (await client.get("/ready")).json() == {"status": "ready"}
        assert (await client.head("/ready")).status_code == 200


async def test_what_drains_finishes_and_takes_in_nothing_new() -> None:
    gate = asyncio.Event()
    fake = FakeStages(gate=gate)
    images = service(fake)
    app = build_http_app(images)
    async with (
        asyncio.timeout(60),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1", timeout=None) as client,
    ):
        under_way = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "p"}))
        await fake.entered.wait()
        images.drain()
        before = list(fake.calls)
        bodies: dict[str, Any] = {path: body for path, body in BODIES.items() if path != INTERRUPT}
        for path, body in (*bodies.items(), (IMAGINE, None), (GENERATIONS, {"prompt": "p", "stream": True})):
            answer = await client.request("GET" if body is None else "POST", path, json=body)
            assert answer.status_code == 503 and "shutting down" in line(path, answer)
            assert answer.headers["retry-after"] == "5" and "x-should-retry" not in answer.headers
        assert fake.calls == before
        ready = await client.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        health = await client.get("/health")
        assert (health.status_code, health.json()["images_in_flight"]) == (200, 1)
        gate.set()
        assert (await under_way).status_code == 200


# Documents


@pytest.mark.parametrize("root", ["", "/img"])
async def test_the_docs_ask_nobody_else(root: str) -> None:
    async with a_client(FakeStages(), root_path=root) as client:
        page = await client.get(f"{root}/docs")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "//" not in page.text.replace("<!doctype html>", "")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self';" in policy and "http" not in policy
        links = [part.split('"')[0] for part in page.text.split('="') if part.startswith("/")]
        assert len(links) == 5 and all(link.startswith(f"{root}/") for link in links)
        for link in links:
            file = await client.get(link)
            assert file.status_code == 200
            again = await client.get(link, headers={"If-None-Match": file.headers.get("etag", "none")})
            assert again.status_code == (304 if "etag" in file.headers else 200)
        assert (await client.get(f"{root}/docs/none.js")).status_code == 404


@pytest.mark.parametrize("root", ["", "/img"])
async def test_the_docs_work_in_a_browser(root: str) -> None:
    """Under their policy and with nobody else to ask: `a_page` fails on a word to another address."""
    app = build_http_app(service(FakeStages()))
    with serving(UnderRoot(app, root)) as server:
        async with a_page(server.url, path=f"{root}/docs", ready=".opblock") as page:
            text = await page.inner_text("#swagger-ui")
            assert GENERATIONS in text and "sdxl-serve" in text
            await page.click("#operations-operations-health_health_get .opblock-summary-control")
            await page.click("#operations-operations-health_health_get .try-out__btn")
            await page.click("#operations-operations-health_health_get .execute")
            answer = page.locator("#operations-operations-health_health_get .live-responses-table .response-col_status")
            await answer.last.wait_for()
            assert "200" in await answer.last.inner_text()


class UnderRoot:
    """As Ray's proxy calls an application with a route prefix."""

    def __init__(self, app: Any, root: str) -> None:
        self._app, self._root = app, root

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app({**scope, "root_path": self._root}, receive, send)
