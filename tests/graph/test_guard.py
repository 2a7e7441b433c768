"""The guard and HTTP's conventions through Ray's own proxy, which reads some of the same headers first."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serve_app.graph.local import Running
from tests.graph.test_batching import stats
from tests.http.test_guard import BODIES, GENERATIONS, IMAGINE, INTERRUPT, NAVIGATION, STABILITY, STRANGERS, line

APP = "https://app.example.com"
QUICK: dict[str, Any] = {"prompt": "a boat", "num_inference_steps": 1, "width": 64, "height": 64}


@pytest.fixture
def http(graph: Running) -> httpx.Client:
    return httpx.Client(base_url=graph.url or "", timeout=120)


def test_a_strangers_page_gets_nothing(http: httpx.Client) -> None:
    for headers in STRANGERS.values():
        for path, body in BODIES.items():
            refused = http.post(path, json=body, headers=headers)
            assert refused.status_code == 403 and "cors_origins" in line(path, refused)
        assert http.get(IMAGINE, headers=headers).status_code == 403
    assert http.get(IMAGINE, headers=NAVIGATION).status_code == 403
    assert http.get("/docs", headers=NAVIGATION).status_code == 200
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for path in BODIES:
        assert http.post(path, content=b"prompt=p", headers=form).status_code == 415
        assert http.post(path, json=BODIES[path], headers={"Host": "evil.example:8000"}).status_code == 403


def test_a_page_that_may_draws(http: httpx.Client) -> None:
    page = {"Origin": APP, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = http.options(GENERATIONS, headers=page | asks)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, APP)
    answer = http.post(GENERATIONS, json=QUICK, headers=page)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, APP)
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_rays_headers_lift_nothing(http: httpx.Client) -> None:
    """Its proxy heeds them before it asks us; what it does not do is go on once we have answered."""
    for name, value in (("x-request-timeout-seconds", "0"), ("x-request-disconnect-disabled", "?1")):
        refused = http.post(GENERATIONS, json=QUICK, headers={name: value})
        assert refused.status_code == 400 and name in line(GENERATIONS, refused)
    late = http.post(
        STABILITY,
        json={"text_prompts": [{"text": "p"}], "steps": 150, "samples": 4},
        headers={"x-request-timeout-seconds": "1"},
    )
    assert late.status_code == 408 and line(STABILITY, late).startswith("no answer within 1 s")
    assert late.json()["id"] == late.headers["x-request-id"]


def test_head_slashes_ids_and_headers(http: httpx.Client) -> None:
    for path in ("/health", "/v1/models", "/v1/models/sdxl", "/sdapi/v1/samplers", "/docs"):
        got, head, slashed = http.get(path), http.head(path), http.get(f"{path}/")
        assert got.status_code == head.status_code == slashed.status_code == 200
        assert head.content == b"" and head.headers["content-length"] == str(len(got.content))
        assert slashed.content == got.content
        assert head.headers.get_list("x-request-id") != got.headers.get_list("x-request-id")
        assert len(got.headers.get_list("x-request-id")) == 1
        assert got.headers["x-content-type-options"] == "nosniff"
    refused = http.put(GENERATIONS)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    for given in ("x" * 257, "\u00e9".encode()):
        assert http.get("/health", headers=[("x-request-id", given)]).status_code == 400
    mine = http.post(STABILITY, json={}, headers={"x-request-id": "mine 2"})
    assert (mine.status_code, mine.json()["id"], mine.headers["x-request-id"]) == (400, "mine 2", "mine 2")


def test_a_compressed_body(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert http.post(GENERATIONS, content=gzip.compress(json.dumps(QUICK).encode()), headers=headers).status_code == 200
    bomb = gzip.compress(b" " * 100_000_000, 1)
    assert http.post(GENERATIONS, content=bomb, headers=headers).status_code == 413
    refused = http.post(GENERATIONS, json=QUICK, headers={"Content-Encoding": "br"})
    assert refused.status_code == 415 and "gzip" in line(GENERATIONS, refused)


def test_a_body_that_does_not_arrive_is_given_up_and_its_connection_closed(graph: Running) -> None:
    place = urlsplit(graph.url or "")
    with socket.create_connection((place.hostname, place.port), timeout=60) as client:
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        client.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt":'.encode())
        answer = b""
        while chunk := client.recv(65536):  # until it is closed
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the body did not arrive within 3 s"


def test_a_body_where_none_is_read_is_refused_and_its_connection_closed(graph: Running) -> None:
    place = urlsplit(graph.url or "")
    with socket.create_connection((place.hostname, place.port), timeout=60) as client:
        head = f"GET {IMAGINE} HTTP/1.1\r\nHost: {place.netloc}\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.sendall(f"{head}4\r\nmore\r\n".encode())  # and it goes on
        answer = b""
        while chunk := client.recv(65536):  # until it is closed
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "GET /imagine takes no body"


async def test_it_is_ready_when_every_stage_is(http: httpx.Client, graph: Running) -> None:
    def until(status: int) -> httpx.Response:
        deadline = time.monotonic() + 120
        while True:
            answer = http.get("/ready")
            assert answer.status_code in (200, 503)
            if answer.status_code == status:
                return answer
            assert time.monotonic() < deadline
            time.sleep(0.1)

    assert until(200).json() == {"status": "ready"}
    os.kill((await stats("VaeDecoder"))["pid"], signal.SIGKILL)
    assert "decode" in line("/ready", until(503))
    assert http.get("/health").status_code == 200
    until(200)
    assert http.post(INTERRUPT).status_code == 200
