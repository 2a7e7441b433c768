"""Who may ask: rebinding names, pages of strangers, and the pages that the operator lets in."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serve_app.config.settings import AppConfig, HttpConfig, parse_config
from serve_app.http.app import build_http_app
from serve_app.request.errors import ConfigurationError
from tests.fakes import FakeStages, service

HOME = "http://127.0.0.1:8000"
APP = "https://app.example.com"
GENERATIONS, SCORE, TXT2IMG = "/v1/images/generations", "/score", "/sdapi/v1/txt2img"
HUGGING_FACE, STABILITY = "/hugging-face/text-to-image", "/v1/generation/sdxl/text-to-image"
INTERRUPT = "/sdapi/v1/interrupt"
IMAGINE = "/imagine?prompt=p"
BODIES: dict[str, Any] = {
    GENERATIONS: {"prompt": "p"},
    SCORE: {"input_data": {"prompt": ["p"]}},
    TXT2IMG: {"prompt": "p", "width": 64, "height": 64},
    HUGGING_FACE: {"inputs": "p"},
    STABILITY: {"text_prompts": [{"text": "p"}]},
    INTERRUPT: {},
}
# Where each format's envelope has its line.
LINES = {
    GENERATIONS: ("error", "message"),
    SCORE: ("message",),
    TXT2IMG: ("detail",),
    HUGGING_FACE: ("error",),
    STABILITY: ("message",),
    INTERRUPT: ("detail",),
}


@asynccontextmanager
async def a_client(
    fake: FakeStages, url: str = HOME, root_path: str = "", limits: dict[str, int] | None = None, **http: Any
) -> AsyncIterator[httpx.AsyncClient]:
    # By loopback, so that webui's interrupt needs no id.
    app = build_http_app(service(fake, http=HttpConfig(**{"loopback": True} | http), **(limits or {})))
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url=url) as client:
        yield client


def line(path: str, answer: httpx.Response) -> str:
    """An error's line, in the envelope of its path's format."""
    found = answer.json()
    for key in LINES.get(path, ("error", "message")):
        found = found[key]
    assert isinstance(found, str) and "\n" not in found
    return found


# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80", "192.168.1.9", "[::1]", "[::1]:8000", "[2001:db8::1]:8000",
        "localhost", "LocalHost:8000", "localhost.", "",
    ],
)  # fmt: skip
async def test_addresses_and_localhost_are_always_this_service(host: str) -> None:
    async with a_client(FakeStages()) as client:
        assert (await client.get("/health", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "127.1", "2130706433",
             "[evil.example]", "testserver"],
)  # fmt: skip
async def test_any_other_name_is_refused_whatever_is_asked(host: str) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for path in (*BODIES, "/health", "/", "/docs", "/openapi.json", "/v1/sdxl/info", "/nothing"):
            method = "POST" if path in BODIES else "GET"
            answer = await client.request(method, path, headers={"Host": host}, json=BODIES.get(path))
            assert answer.status_code == 403, path
            said = line(path, answer)
            assert "http.allowed_hosts" in said and host.partition(":")[0].strip("[]") in said
    assert fake.calls == []


async def test_the_operator_can_allow_names() -> None:
    async with a_client(FakeStages(), allowed_hosts=("gpubox", "*.example.com")) as client:
        for host, status in {
            "gpubox": 200, "gpubox:8000": 200, "GPUBOX": 200, "a.example.com": 200, "a.b.example.com:1": 200,
            "example.com": 403, "evilexample.com": 403, "gpubox.evil.com": 403, "a.example.com.evil.com": 403,
        }.items():  # fmt: skip
            assert (await client.get("/health", headers={"Host": host})).status_code == status, host
    async with a_client(FakeStages(), allowed_hosts=("*",)) as client:
        assert (await client.get("/health", headers={"Host": "any.example"})).status_code == 200


async def test_two_hosts_are_none() -> None:
    async with a_client(FakeStages()) as client:
        answer = await client.get("/health", headers=[("Host", "localhost"), ("Host", "evil.example")])
    assert answer.status_code == 400


def test_the_name_that_http_is_bound_to_is_allowed() -> None:
    config = AppConfig()
    assert config.listening_on("GPUbox.lan").http.allowed_hosts == ("gpubox.lan",)
    for host in ("0.0.0.0", "127.0.0.1", "::", "::1", None):
        assert config.listening_on(host).http.allowed_hosts == ()
    named = config.listening_on("gpubox")
    assert named.listening_on("gpubox") == named


# Pages of strangers

FETCH = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
STRANGERS: dict[str, dict[str, str]] = {
    "a script's fetch": FETCH,
    "the same without Sec-Fetch": {"Origin": "http://evil.example"},
    "another port": {"Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-site"},
    "another scheme": {"Origin": "https://127.0.0.1:8000"},
    "a sandbox or a file": {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
    "no-cors without an origin": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    "a page of the same site": {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    "an empty origin": {"Origin": ""},
}


@pytest.mark.parametrize("headers", STRANGERS.values(), ids=STRANGERS)
async def test_a_strangers_page_posts_nothing(headers: dict[str, str]) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for path, body in BODIES.items():
            answer = await client.post(path, json=body, headers=headers)
            assert answer.status_code == 403 and "http.cors_origins" in line(path, answer)
            assert "access-control-allow-origin" not in answer.headers
    assert fake.calls == []


@pytest.mark.parametrize("headers", STRANGERS.values(), ids=STRANGERS)
async def test_nor_does_it_read_anything(headers: dict[str, str]) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for path in (IMAGINE, "/health", "/sdapi/v1/progress", "/v1/sdxl/info", "/page/main.js", "/"):
            for method in ("GET", "HEAD"):
                assert (await client.request(method, path, headers=headers)).status_code == 403, path
    assert fake.calls == []


NAVIGATION = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


async def test_a_link_leads_to_the_pages_and_draws_nothing() -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for path in ("/", "/docs", "/docs/"):
            assert (await client.get(path, headers=NAVIGATION)).status_code == 200
            framed = NAVIGATION | {"Sec-Fetch-Dest": "iframe"}
            assert (await client.get(path, headers=framed)).status_code == 403
            assert (await client.post(path, headers=NAVIGATION)).status_code == 403
        for path in (IMAGINE, "/health", "/sdapi/v1/progress"):
            assert (await client.get(path, headers=NAVIGATION)).status_code == 403
    async with a_client(fake, root_path="/img") as client:
        assert (await client.get("/img/docs", headers=NAVIGATION)).status_code == 200
        assert (await client.get("/img", headers=NAVIGATION)).status_code == 200
        assert (await client.get(f"/img{IMAGINE}", headers=NAVIGATION)).status_code == 403
    assert fake.calls == []


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data"])
async def test_a_form_of_an_old_browser_which_says_nothing_is_of_the_wrong_type(content_type: str) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for path in BODIES:
            answer = await client.post(path, content=b'{"prompt": "p"}', headers={"Content-Type": content_type})
            assert answer.status_code == 415
            assert line(path, answer) == "Expects Content-Type to be application/json"
    assert fake.calls == []


@pytest.mark.parametrize(
    "headers",
    [
        {},  # no browser
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},  # typed by the user
        {"Sec-Fetch-Site": "same-origin"},
        {"Origin": HOME},
        {"Origin": HOME, "Sec-Fetch-Site": "same-origin"},
        # Behind a gateway with TLS, which may also change the host.
        {"Origin": "https://sdxl.example.com", "Sec-Fetch-Site": "same-origin"},
    ],
)
async def test_the_services_own_page_and_what_is_no_page_may_all(headers: dict[str, str]) -> None:
    async with a_client(FakeStages()) as client:
        assert (await client.get(IMAGINE, headers=headers)).status_code == 200
        for path, body in BODIES.items():
            assert (await client.post(path, json=body, headers=headers)).status_code == 200


# The operator's other pages


async def test_a_page_that_may_has_a_working_preflight_and_reads_the_answer() -> None:
    fake = FakeStages()
    page = {"Origin": APP, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    asks = page | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-api-key"}
    async with a_client(fake, cors_origins=(APP, "http://localhost:3000")) as client:
        for path, body in BODIES.items():
            preflight = await client.options(path, headers=asks)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == APP
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert preflight.headers["access-control-allow-headers"] == "content-type,x-api-key"
            answer = await client.post(path, json=body, headers=page)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == APP and "Origin" in answer.headers["vary"]
            exposed = set(re.split(r",\s*", answer.headers["access-control-expose-headers"]))
            assert {"X-Request-Id", "Server-Timing", "X-SDXL-Warnings", "Retry-After", "X-SDXL-Seed"} <= exposed
        # What is refused is readable, too.
        for content, content_type, status in ((b"{}", "text/plain", 415), (b"{", "application/json", 400)):
            refused = await client.post(GENERATIONS, content=content, headers=page | {"Content-Type": content_type})
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (status, APP)
        assert (await client.get("/nothing", headers=page)).headers["access-control-allow-origin"] == APP
        for path, headers, status in (
            ("/health", {"X-Request-Id": "x" * 257}, 400),
            ("/health", {"Cookie": "x" * 70_000}, 431),
            ("/health", {"Host": "evil.example"}, 403),
        ):
            refused = await client.get(path, headers=page | headers)
            assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (status, APP)
            assert refused.headers["vary"] == "Origin"
        local = await client.options("/imagine", headers=asks | {"Access-Control-Request-Private-Network": "true"})
        assert local.headers["access-control-allow-private-network"] == "true"


async def test_nobody_else_has() -> None:
    fake = FakeStages()
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    for origins in ((), (APP,)):
        async with a_client(fake, cors_origins=origins) as client:
            for origin in ("https://evil.example", f"{APP}.evil.example", f"{APP}:8443", "null", "https://example.com"):
                answer = await client.options(GENERATIONS, headers=asks | {"Origin": origin})
                assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
                assert "cors_origins" in line(GENERATIONS, answer)
    async with a_client(fake, cors_origins=(APP,)) as client:
        answer = await client.options(
            GENERATIONS, headers=asks | {"Origin": APP, "Access-Control-Request-Method": "PUT"}
        )
        assert answer.status_code == 400 and line(GENERATIONS, answer) == "Disallowed CORS method"
        assert fake.calls == []


async def test_a_page_that_may_reads_a_fault_of_ours() -> None:
    app = build_http_app(service(FakeStages(), http=HttpConfig(cors_origins=(APP,))))

    @app.get("/fault")
    async def fails() -> None:
        raise RuntimeError("secret")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=HOME) as client:
        answer = await client.get("/fault", headers={"Origin": APP})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, APP)
    assert answer.headers.get_list("vary") == ["Origin"]


async def test_any_page_may_where_the_operator_says_so() -> None:
    async with a_client(FakeStages(), cors_origins=("*",)) as client:
        answer = await client.get(IMAGINE, headers=FETCH)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
        image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert (await client.get(IMAGINE, headers=image)).status_code == 200


async def test_a_rebound_name_does_not_come_in_as_an_allowed_origin() -> None:
    async with a_client(FakeStages(), cors_origins=("*",)) as client:
        headers = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000", "Sec-Fetch-Site": "same-origin"}
        assert (await client.post(GENERATIONS, json=BODIES[GENERATIONS], headers=headers)).status_code == 403


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("allowed_hosts", "http://a.example"), ("allowed_hosts", "a.example:8000"), ("allowed_hosts", "a/b"),
        ("allowed_hosts", ""), ("allowed_hosts", "A.example"), ("allowed_hosts", "*."), ("allowed_hosts", "a..b"),
        ("cors_origins", "app.example.com"), ("cors_origins", "https://app.example.com/"), ("cors_origins", "null"),
        ("cors_origins", "https://App.example.com"), ("cors_origins", "https://*.example.com"),
        ("cors_origins", "https://app.example.com:"), ("cors_origins", "https://app.example.com:08443"),
    ],
)  # fmt: skip
def test_a_setting_that_could_never_match_is_an_error(key: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"args\.http\.{key}: '{re.escape(value)}' is no "):
        parse_config({"http": {key: [value]}})


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        ("https://app.example.com:443", "without https's own port: drop :443"),
        ("http://x:80", "without http's own port: drop :80"),
        ("http://[::1]:80", "without http's own port: drop :80"),
        ("https://app.example.com:65536", "has no port"),
    ],
)
def test_an_origin_with_a_port_that_browsers_leave_out_is_an_error(origin: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(reason)):
        parse_config({"http": {"cors_origins": [origin]}})


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.com", "http://localhost:3000", "http://[::1]:3000", "http://192.168.1.9",
        "chrome-extension://abcdef", "http://[2001:db8::80]", "https://[2001:db8::443]", "http://x:443", "https://x:80",
        "https://x:65535",
    ],
)  # fmt: skip
def test_an_origin_as_browsers_write_it_is_taken(origin: str) -> None:
    assert parse_config({"http": {"cors_origins": [origin]}}).http.cors_origins == (origin,)
