"""How one may ask: types of bodies, their compression, size and time, and Ray's own headers."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from serve_app.http.app import build_http_app
from serve_app.http.body import MAX_MEMBERS, decompressed
from serve_app.request.errors import InvalidRequest
from tests.fakes import FakeStages, service
from tests.http.test_guard import BODIES, GENERATIONS, IMAGINE, INTERRUPT, SCORE, STABILITY, a_client, line

PICTURES = [path for path in BODIES if path != INTERRUPT]
JSON = {"Content-Type": "application/json"}


# Types


@pytest.mark.parametrize("path", PICTURES)
async def test_a_body_needs_its_type(path: str) -> None:
    fake = FakeStages()
    body = json.dumps(BODIES[path]).encode()
    async with a_client(fake) as client:
        for given_type in ({}, {"Content-Type": ""}, {"Content-Type": "application/jsonp"}, {"Content-Type": "*/*"}):
            answer = await client.post(path, content=body, headers=given_type)
            assert answer.status_code == 415
            assert line(path, answer) == "Expects Content-Type to be application/json"
        assert fake.calls == []
        for given_type in ("application/json", "Application/JSON", 'application/json; charset="UTF-8"'):
            assert (await client.post(path, content=body, headers={"Content-Type": given_type})).status_code == 200


async def test_what_takes_no_body_needs_no_type_where_there_is_none() -> None:
    async with a_client(FakeStages()) as client:
        assert (await client.post(INTERRUPT)).status_code == 200
        assert (await client.post(INTERRUPT, headers=JSON)).status_code == 200
        assert (await client.post(INTERRUPT, content=b"x")).status_code == 415


async def test_an_address_that_is_none_is_404_or_405_whatever_its_type() -> None:
    async with a_client(FakeStages()) as client:
        assert (await client.post("/nothing", content=b"x")).status_code == 404
        assert (await client.post("/imagine", content=b"x")).status_code == 405


# Compression

MIB = 2**20


@pytest.mark.parametrize("path", PICTURES)
async def test_a_gzip_body_is_read(path: str) -> None:
    body = gzip.compress(json.dumps(BODIES[path]).encode())
    async with a_client(FakeStages()) as client:
        for encoding in ("gzip", "GZIP", "x-gzip"):
            answer = await client.post(path, content=body, headers=JSON | {"Content-Encoding": encoding})
            assert answer.status_code == 200
        plain = await client.post(path, json=BODIES[path], headers={"Content-Encoding": "identity"})
        assert plain.status_code == 200


@pytest.mark.parametrize("path", PICTURES)
async def test_other_encodings_are_named_and_refused(path: str) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for encoding in ("br", "deflate", "zstd", "gzip, gzip", "gzip, br", "nonsense"):
            answer = await client.post(path, json=BODIES[path], headers={"Content-Encoding": encoding})
            assert answer.status_code == 415
            assert encoding in line(path, answer) and "gzip" in line(path, answer)
    assert fake.calls == []


WHOLE = gzip.compress(json.dumps({"prompt": "p"}).encode(), mtime=0)
WRONG_SUM = WHOLE[:-8] + bytes([WHOLE[-8] ^ 1]) + WHOLE[-7:]


@pytest.mark.parametrize(
    "body",
    [WHOLE[:-9], WHOLE[:5], WRONG_SUM, b"no gzip", WHOLE + b"more", zlib.compress(b"{}"), b"\x1f\x8b" + b"\0" * 99],
)
async def test_broken_gzip_is_one_line(body: bytes) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        answer = await client.post(GENERATIONS, content=body, headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.status_code == 400 and "not valid gzip" in line(GENERATIONS, answer)
    assert fake.calls == []


@pytest.mark.parametrize(("path", "limit"), [(GENERATIONS, 256 * 1024), (SCORE, 4 * MIB), (STABILITY, 256 * 1024)])
async def test_the_decompressed_bytes_count_and_a_bomb_is_not_unpacked(path: str, limit: int) -> None:
    body = json.dumps(BODIES[path]).encode()
    fits, over = body + b" " * (limit - len(body)), body + b" " * (limit - len(body) + 1)
    async with a_client(FakeStages()) as client:
        headers = JSON | {"Content-Encoding": "gzip"}
        assert (await client.post(path, content=gzip.compress(fits), headers=headers)).status_code == 200
        answer = await client.post(path, content=gzip.compress(over), headers=headers)
        assert answer.status_code == 413 and line(path, answer) == f"the body is larger than {limit} bytes"
        assert (await client.post(path, content=fits, headers=JSON)).status_code == 200
        assert (await client.post(path, content=over, headers=JSON)).status_code == 413
        bomb = gzip.compress(b" " * 200 * MIB, 1)
        assert len(bomb) < 4 * MIB
        answer = await client.post(path, content=bomb, headers=headers)
        assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "limits", "most"),
    [
        (GENERATIONS, {}, 256 * 1024),
        (SCORE, {}, 4 * MIB),
        (SCORE, {"max_body_bytes": 100_000}, 100_000),
        # A limit of text above that of /score is not capped by it.
        (GENERATIONS, {"max_body_bytes": 100_000, "max_text_body_bytes": 300_000}, 300_000),
    ],
)
async def test_compressed_bytes_that_give_none_count_too(path: str, limits: dict[str, int], most: int) -> None:
    """Up to the route's own limit: stored blocks of a length of 0, in a gzip member that never ends."""
    sent = 0

    async def empty_blocks() -> AsyncIterator[bytes]:
        nonlocal sent
        yield gzip.compress(b"")[:10]
        while True:
            sent += 50_000
            yield b"\x00\x00\x00\xff\xff" * 10_000

    async with asyncio.timeout(60), a_client(FakeStages(), limits=limits) as client:
        answer = await client.post(path, content=empty_blocks(), headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.status_code == 413 and line(path, answer) == f"the body is larger than {most} bytes"
    assert most - 50_000 < sent <= most + 50_000


async def test_a_limit_of_text_above_that_of_rows_holds_for_compressed_bodies() -> None:
    noise = random.Random(0).randbytes(120_000).hex()
    body = gzip.compress(json.dumps({"prompt": "p", "own": noise}).encode())
    assert len(body) > 100_000
    async with a_client(FakeStages(), limits={"max_body_bytes": 100_000, "max_text_body_bytes": 300_000}) as client:
        answer = await client.post(GENERATIONS, content=body, headers=JSON | {"Content-Encoding": "gzip"})
    assert answer.status_code == 200


@pytest.mark.parametrize("path", PICTURES)
async def test_a_body_of_many_members_is_refused(path: str) -> None:
    fake = FakeStages()
    body = gzip.compress(json.dumps(BODIES[path]).encode())
    async with a_client(fake) as client:
        headers = JSON | {"Content-Encoding": "gzip"}
        few = await client.post(path, content=gzip.compress(b"") * (MAX_MEMBERS - 1) + body, headers=headers)
        assert few.status_code == 200
        called = len(fake.calls)
        for many in (gzip.compress(b"") * MAX_MEMBERS + body, gzip.compress(b"") * 10_000):
            answer = await client.post(path, content=many, headers=headers)
            assert answer.status_code == 400
            assert line(path, answer) == f"the body has more than {MAX_MEMBERS} gzip members"
        assert len(fake.calls) == called


async def test_whatever_gzip_holds_others_have_the_loop_in_between() -> None:
    """From a `receive` that never suspends, as where all of it has arrived before it is read."""
    empty = gzip.compress(b"")
    blocks = empty[:10] + b"\x00\x00\x00\xff\xff" * 1000

    async def turns_taken(chunks: list[bytes]) -> int:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async def receive() -> Message:
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

        receive_plain = decompressed(receive, lambda: 10 * MIB)
        beside = asyncio.create_task(others())
        with suppress(InvalidRequest):
            while (await receive_plain()).get("more_body"):
                pass
        beside.cancel()
        return turns

    assert await turns_taken([empty * 200_000]) >= MAX_MEMBERS
    assert await turns_taken([blocks] + [blocks[10:]] * 40) >= 40


# Bodies where none is read


@pytest.mark.parametrize(
    ("method", "path"), [*(("GET", path) for path in (IMAGINE, "/health", "/v1/models", "/")), ("HEAD", IMAGINE)]
)
async def test_a_route_that_takes_no_body_is_not_sent_one(method: str, path: str) -> None:
    fake = FakeStages()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)

    async with asyncio.timeout(60), a_client(fake) as client:
        chunked = await client.request(method, path, content=endless())
        small = await client.request(method, path, content=b"{}", headers=JSON)
        for answer in (chunked, small):
            assert (answer.status_code, answer.headers["connection"]) == (400, "close")
            if method == "GET":
                assert line(path, answer) == f"GET {path.partition('?')[0]} takes no body"
                assert answer.json()["error"]["code"] == "unexpected_body"
        assert fake.calls == []
        assert (await client.request(method, path, headers={"Content-Length": "0"})).status_code == 200


async def test_a_post_without_a_body_may_have_an_empty_object_and_nothing_endless() -> None:
    async def chunked() -> AsyncIterator[bytes]:
        yield b"{}"

    async with a_client(FakeStages()) as client:
        assert (await client.post(INTERRUPT, json={})).status_code == 200
        for content in (chunked(), b" " * (256 * 1024 + 1)):
            answer = await client.post(INTERRUPT, content=content, headers=JSON)
            assert (answer.status_code, answer.headers["connection"]) == (400, "close")
            assert line(INTERRUPT, answer) == f"POST {INTERRUPT} takes no body"


# All bodies together


@pytest.mark.parametrize("path", PICTURES)
async def test_bodies_that_are_read_at_once_are_bounded_in_sum(path: str) -> None:
    images = service(FakeStages())
    images.bodies.max_bytes = 1000
    go_on, begun = asyncio.Event(), asyncio.Event()
    body = json.dumps(BODIES[path]).encode()

    async def held() -> AsyncIterator[bytes]:
        yield b" " * 900
        begun.set()
        await go_on.wait()
        yield body

    app = build_http_app(images)
    async with (
        asyncio.timeout(60),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client,
    ):
        first = asyncio.create_task(client.post(path, content=held(), headers=JSON))
        await begun.wait()
        full = await client.post(path, content=b" " * 101 + body, headers=JSON)
        assert full.status_code == 503 and full.headers["retry-after"] == "1"
        assert line(path, full).startswith("the service is full: bodies of ")
        go_on.set()
        assert (await first).status_code == 200
        assert images.bodies.bytes == 0
        assert (await client.post(path, content=b" " * 101 + body, headers=JSON)).status_code == 200
        assert (await client.post(path, content=b" " * 500 + b"{", headers=JSON)).status_code == 400
        assert images.bodies.bytes == 0


async def test_a_picture_that_is_drawn_holds_no_body() -> None:
    fake = FakeStages(gate=asyncio.Event())
    images = service(fake)
    app = build_http_app(images)
    async with (
        asyncio.timeout(60),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client,
    ):
        drawn = asyncio.create_task(client.post(GENERATIONS, json=BODIES[GENERATIONS]))
        await fake.entered.wait()
        assert images.bodies.bytes == 0
        assert fake.gate is not None
        fake.gate.set()
        assert (await drawn).status_code == 200


def test_the_largest_body_always_fits() -> None:
    assert service(FakeStages()).bodies.max_bytes == 64 * MIB
    assert service(FakeStages(), max_body_bytes=100 * MIB).bodies.max_bytes == 100 * MIB
    assert service(FakeStages(), max_text_body_bytes=100 * MIB).bodies.max_bytes == 100 * MIB


@pytest.mark.parametrize("path", PICTURES)
async def test_a_service_that_drains_reads_no_body(path: str) -> None:
    images = service(FakeStages())
    images.drain()

    async def unread() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    app = build_http_app(images)
    async with (
        asyncio.timeout(60),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client,
    ):
        answer = await client.post(path, content=unread(), headers=JSON)
        assert answer.status_code == 503 and "shutting down" in line(path, answer)
        known = await client.post("/internal/progress", json={"id_task": "mine"})
        assert known.status_code == 200, "who waits for a picture can still ask"


@given(st.lists(st.binary(max_size=300_000), min_size=1, max_size=3), st.integers(1, 200_000))
async def test_gzip_gives_back_what_it_was_given_however_it_arrives(members: list[bytes], size: int) -> None:
    packed = b"".join(gzip.compress(member * 3) for member in members)
    chunks = [packed[at : at + size] for at in range(0, len(packed), size)]
    messages: list[Message] = [
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
        for number, chunk in enumerate(chunks)
    ]

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    read, more = b"", True
    receive_plain = decompressed(receive, lambda: 10 * MIB)
    while more:
        message = await receive_plain()
        assert len(message["body"]) <= 64 * 1024
        read, more = read + message["body"], message["more_body"]
    assert read == b"".join(member * 3 for member in members)
    assert (await receive_plain())["type"] == "http.disconnect"


async def test_a_client_that_goes_away_within_its_gzip_is_gone() -> None:
    messages: list[Message] = [
        {"type": "http.request", "body": WHOLE[:9], "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    assert (await decompressed(receive, lambda: MIB)())["type"] == "http.disconnect"


async def test_gzip_that_is_cut_off_is_an_error() -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": WHOLE[:12], "more_body": False}

    receive_plain = decompressed(receive, lambda: MIB)
    with pytest.raises(InvalidRequest, match="cut off"):
        while True:
            await receive_plain()


@pytest.mark.parametrize("path", PICTURES)
async def test_a_byte_order_mark_is_read_over(path: str) -> None:
    body = json.dumps(BODIES[path]).encode("utf-8-sig")
    assert body[:3] == b"\xef\xbb\xbf"
    async with a_client(FakeStages()) as client:
        assert (await client.post(path, content=body, headers=JSON)).status_code == 200
        assert (
            await client.post(path, content=json.dumps(BODIES[path]).encode("utf-16"), headers=JSON)
        ).status_code == 400


# Time


@pytest.mark.parametrize("path", PICTURES)
async def test_a_body_that_does_not_arrive_is_given_up(path: str) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    fake = FakeStages()
    async with asyncio.timeout(60), a_client(fake, body_timeout_s=0.2) as client:
        for headers in (JSON, JSON | {"Content-Encoding": "gzip"}):
            answer = await client.post(path, content=slow(), headers=headers)
            assert answer.status_code == 408
            assert line(path, answer) == "the body did not arrive within 0.2 s"
            assert answer.headers["connection"] == "close" and "x-should-retry" not in answer.headers
    assert fake.calls == []


async def test_a_body_that_drips_is_given_up_as_well() -> None:
    sent = 0

    async def dripping() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" "
            await asyncio.sleep(0.01)

    async with asyncio.timeout(60), a_client(FakeStages(), body_timeout_s=0.3) as client:
        answer = await client.post(GENERATIONS, content=dripping(), headers=JSON)
    assert answer.status_code == 408 and sent > 1


async def test_only_the_body_is_in_a_hurry() -> None:
    """The picture may take longer than the body, alone and in a stream."""
    gate = asyncio.Event()
    fake = FakeStages(gate=gate)
    async with asyncio.timeout(60), a_client(fake, body_timeout_s=0.1) as client:
        alone = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "p"}))
        stream = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "p", "stream": True}))
        await asyncio.sleep(0.4)
        gate.set()
        assert (await alone).status_code == 200
        assert "image_generation.completed" in (await stream).text


# Ray's headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("x-request-disconnect-disabled", value) for value in ("?1", "?0", "", "1")),
        *(
            ("X-Request-Timeout-Seconds", value)
            for value in ("0", "-1", "nan", "inf", "600.5", "1e9", "", "soon", "-0.0")
        ),
    ],
)
async def test_no_client_lifts_the_operators_limits(name: str, value: str) -> None:
    fake = FakeStages()
    async with a_client(fake) as client:
        for path in (*BODIES, IMAGINE, "/health", "/"):
            method, headers = "POST" if path in BODIES else "GET", {name: value}
            answer = await client.request(method, path, json=BODIES.get(path), headers=headers)
            assert answer.status_code == 400 and name.lower() in line(path, answer)
    assert fake.calls == []


async def test_a_shorter_time_is_taken_and_of_two_both_must_be() -> None:
    async with a_client(FakeStages(), request_timeout_s=30.0) as client:
        for value, status in {"30": 200, "0.5": 200, "30.1": 400}.items():
            answer = await client.get(IMAGINE, headers={"x-request-timeout-seconds": value})
            assert answer.status_code == status
        twice = [("x-request-timeout-seconds", "0"), ("x-request-timeout-seconds", "5")]
        for headers in (twice, twice[::-1]):
            assert (await client.get(IMAGINE, headers=headers)).status_code == 400


@pytest.mark.parametrize("path", [*PICTURES, IMAGINE])
async def test_a_request_that_takes_too_long_ends_in_its_own_envelope(path: str) -> None:
    fake = FakeStages(gate=asyncio.Event())
    async with asyncio.timeout(60), a_client(fake) as client:
        headers = {"x-request-timeout-seconds": "0.3"}
        answer = await client.request("POST" if path in BODIES else "GET", path, json=BODIES.get(path), headers=headers)
        assert answer.status_code == 408 and line(path, answer).startswith("no answer within 0.3 s")
        assert answer.headers["x-should-retry"] == "false", "OpenAI's client would draw it again"
        assert fake.cancelled, "its slots are free"
        assert (await client.get("/health")).json()["images_in_flight"] == 0


async def test_a_stream_that_has_begun_is_not_cut_here() -> None:
    gate = asyncio.Event()
    async with asyncio.timeout(60), a_client(FakeStages(gate=gate)) as client:
        body = {"prompt": "p", "stream": True}
        task = asyncio.create_task(client.post(GENERATIONS, json=body, headers={"x-request-timeout-seconds": "0.2"}))
        await asyncio.sleep(0.5)
        gate.set()
        assert "image_generation.completed" in (await task).text


def test_the_helpers_of_this_file_know_every_route(picture_routes: set[str]) -> None:
    drawing = picture_routes - {"/internal/progress"}
    assert drawing == {path.replace("/sdxl/", "/{engine}/") for path in PICTURES}


@pytest.fixture
def picture_routes() -> set[str]:
    paths: dict[str, Any] = build_http_app(service(FakeStages())).openapi()["paths"]
    return {path for path, operations in paths.items() if "requestBody" in operations.get("post", {})}


def test_httpx_sends_no_type_of_its_own() -> None:
    """What the tests above lean on."""
    assert "content-type" not in httpx.Request("POST", "http://127.0.0.1", content=b"x").headers
