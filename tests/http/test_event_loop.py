"""No body, query or header holds the event loop: the largest of every format, over stages without models."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serve_app.formats.answers import json_response
from serve_app.formats.json_body import MAX_DEPTH, MAX_VALUES
from serve_app.http.app import build_http_app
from serve_app.http.head import MAX_HEAD_BYTES
from serve_app.request.fields import MAX_PROMPT_CHARS
from tests.fakes import FACTS, FakeStages, service

MAX_HOLD_S = 0.1
BODY_BYTES = 4 * 2**20  # `limits.max_body_bytes` as it stands
CHUNK = 64 * 2**10


@dataclass
class Probe:
    """The longest that the event loop was held between two of its turns, in seconds.

    The lesser of two measures: of the clock, which also counts what other processes took of a busy machine, and of
    the processor's time of all our threads, which also counts a thread that ran beside the event loop.
    """

    longest_s: float = 0.0
    _clocks: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            self.look()

    def look(self) -> None:
        now = (time.monotonic(), time.process_time())
        self.longest_s = max(self.longest_s, min(new - old for new, old in zip(now, self._clocks, strict=True)))
        self._clocks = now


async def ask(
    app: Any, method: str, path: str, body: bytes = b"", query: bytes = b"", headers: tuple[tuple[str, str], ...] = ()
) -> tuple[int, bytes]:
    """Status and body of an answer; the request comes in pieces, as from a socket."""
    pieces = [body[start : start + CHUNK] for start in range(0, len(body), CHUNK)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def longest_hold_s(work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """How long `work` held the loop at most, the least of up to three tries; and what it gave."""
    least, result = float("inf"), None
    for _ in range(3):
        probe = Probe()
        looking = asyncio.create_task(probe.run())
        await asyncio.sleep(0.002)
        result = await work()
        probe.look()
        looking.cancel()
        least = min(least, probe.longest_s)
        if least < MAX_HOLD_S:
            break
    return least, result


async def check(name: str, work: Callable[[], Awaitable[tuple[int, bytes]]], *statuses: int) -> None:
    held_s, (status, answer) = await longest_hold_s(work)
    assert status in statuses, f"{name}: {status} {answer[:200]!r}"
    assert len(answer) < 20_000 or status == 200, f"{name}: the error repeats what was sent"
    assert held_s < MAX_HOLD_S, f"{name}: held for {held_s * 1000:.0f} ms"


def repeated(unit: bytes, before: bytes = b"", after: bytes = b"", most: int = BODY_BYTES) -> bytes:
    """As many of a unit as fit beside what stands around it, with room for a format's own words."""
    return before + unit * min((BODY_BYTES - 1_000 - len(before) - len(after)) // len(unit), most) + after


def text(unit: bytes) -> bytes:
    return repeated(unit, b'"', b'"')


_FEW = MAX_VALUES // 2 - 100
# Values of the largest size, each the worst for some reader. What is refused as it is counted, or is no JSON:
REFUSED: dict[str, bytes] = {
    "numbers": repeated(b"0,", b"[", b"0]"),
    "floats": repeated(b"1.5e300,", b"[", b"0]"),
    "lists": repeated(b"[],", b"[", b"0]"),
    "objects": repeated(b"{},", b"[", b"0]"),
    "rows": repeated(b'{"prompt":"p"},', b"[", b'{"prompt":"p"}]'),
    "rows and a wrong one": repeated(b'{"prompt":"p"},', b"[", b'{"prompt":0}]'),
    "texts": repeated(b'"p",', b"[", b'"p"]'),
    "texts without commas": repeated(b'"p"'),
    "keys": b"{" + b",".join(b'"%x":0' % number for number in range(380_000)) + b"}",
    "one key": repeated(b'"a":0,', b"{", b'"a":0}'),
    "depth": repeated(b"["),
    "depth of objects": repeated(b'{"a":'),
    "digits": repeated(b"9"),
    "lines": repeated(b"\n", b"", b"x"),
}
# What is one value only, and long.
LONG: dict[str, bytes] = {
    "letters": text(b"a"),
    "commas": text(b","),
    "brackets": text(b"["),
    "escapes": text(b"\\n"),
    "escaped quotes": text(b'\\",'),
    "escaped letters": text(b"\\u00e9"),
    "emoji": text("🦊".encode()),
    "decimals": repeated(b"1", b"0."),
    "spaces": repeated(b" ", b"", b"0"),
}
# What a format reads, and as many as are let through.
READ: dict[str, bytes] = {
    "dots": text(b"."),
    "titles": text(b" [0123456789abcdef"),
    "surrogates": text(b"\\ud83d"),
    "depth": b"[" * (MAX_DEPTH - 8) + b'"' + b"a" * 4_000_000 + b'"' + b"]" * (MAX_DEPTH - 8),
    "numbers": repeated(b"0,", b"[", b"0]", 2 * _FEW),
    "objects": repeated(b"{},", b"[", b"0]", _FEW),
    "rows": repeated(b'{"prompt":"' + b"p" * 300 + b'"},', b"[", b'{"prompt":"p"}]', _FEW // 2),
    "texts": repeated(b'"' + b"p" * 180 + b'",', b"[", b'"p"]', 2 * _FEW),
    "keys": b"{" + b",".join(b'"%0200x":0' % number for number in range(2 * _FEW)) + b"}",
    "rows of keys": b"[" + b",".join(b'{"prompt":"p","%0300x":0}' % number for number in range(6_000)) + b"]",
    "long keys": b"{" + b",".join(b'"%0100000x":0' % number for number in range(40)) + b"}",
    "infotext": json.dumps("p\n" + "Steps: 1, " * 6_000 + "a" * 5_000).encode(),
    "infotext of letters": json.dumps("p\n" + "a" * 65_000).encode(),
    "infotext of keys": json.dumps("p\n" + "".join(f"k{number}: 1, " for number in range(5_000))).encode(),
}

# Where a value may stand: `@` in the bodies of a route.
PLACES: dict[str, tuple[str, ...]] = {
    "/v1/images/generations": (
        "@", '{"prompt": @}', '{"prompt": "p", "own": @}', '{"prompt": "p", "svg": @}', '{"prompt": "p", "size": @}',
        '{"prompt": "p", "original_size": @}', '{"prompt": "p", "model": @}', '{"prompt": "p", "seed": @}',
        '{"prompt": "p", "stream": true, "user": @}',
    ),
    "/score": (
        "@", '{"input_data": @}', '{"input_data": {"columns": ["prompt"], "data": @}}',
        '{"input_data": {"columns": @, "data": []}}', '{"input_data": {"columns": ["prompt"], "data": [], "index": @}}',
        '{"input_data": {"prompt": @}}', '{"input_data": {"prompt": ["p"], "own": @}}',
        '{"input_data": {"prompt": ["p"], "parameters": @}}', '{"input_data": [], "params": {"seed": @}}',
    ),
    "/hugging-face/text-to-image": (
        "@", '{"inputs": @}', '{"inputs": "p", "parameters": @}', '{"inputs": "p", "options": @}',
        '{"inputs": "p", "parameters": {"scheduler": @}}',
    ),
    "/sdapi/v1/txt2img": (
        "@", '{"prompt": @}', '{"prompt": "p", "own": @}', '{"prompt": "p", "styles": @}', '{"infotext": @}',
        '{"prompt": "p", "alwayson_scripts": @}', '{"prompt": "p", "override_settings": @}',
        '{"prompt": "p", "script_args": @}', '{"prompt": "p", "comments": @}', '{"prompt": "p", "sampler_name": @}',
        '{"prompt": "p", "refiner_checkpoint": @}', '{"prompt": "p", "force_task_id": @}',
        '{"prompt": "p", "override_settings": {"sd_model_checkpoint": @}}',
    ),
    "/v1/generation/sdxl/text-to-image": (
        "@", '{"text_prompts": @}', '{"text_prompts": [{"text": @}]}', '{"text_prompts": [{"text": "p"}], "extras": @}',
        '{"text_prompts": [{"text": "p"}], "own": @}', '{"text_prompts": [{"text": "p"}], "sampler": @}',
        '{"text_prompts": [{"text": "p", "own": @}]}',
    ),
}  # fmt: skip
JSON = (("Content-Type", "application/json"),)


@pytest.fixture
def app() -> Any:
    # The largest bodies reach every format's reader: the bound of its route is another test's.
    return build_http_app(service(FakeStages(), max_text_body_bytes=BODY_BYTES, max_body_bytes=BODY_BYTES))


def in_place(place: str, value: bytes) -> bytes:
    body = place.encode().replace(b"@", value)
    assert len(body) <= BODY_BYTES
    return body


@pytest.mark.parametrize("path", PLACES)
async def test_a_body_that_is_counted_and_refused_holds_nobody_up(app: Any, path: str) -> None:
    place = PLACES[path][1]
    for name, value in (REFUSED | LONG).items():
        body = in_place(place, value)
        await check(name, lambda body=body: ask(app, "POST", path, body, headers=JSON), 400)


@pytest.mark.parametrize(("path", "place"), [(path, place) for path, places in PLACES.items() for place in places])
async def test_the_largest_body_that_is_read_holds_nobody_up(app: Any, path: str, place: str) -> None:
    for name, value in READ.items():
        body = in_place(place, value)
        await check(name, lambda body=body: ask(app, "POST", path, body, headers=JSON), 200, 400, 404)


async def test_rows_of_the_longest_prompts_hold_nobody_up() -> None:
    """As many as there may be, over the demo model, which looks at every word."""
    rows = 480
    app = build_http_app(service(FakeStages(), replace(FACTS, embedded_demo=True), max_images_in_flight=rows))
    prompt = "a " * (MAX_PROMPT_CHARS // 2)
    # Each is looked at, and then all are refused for their number, so that nothing is drawn.
    body = json.dumps({"input_data": [{"prompt": prompt, "negative_prompt": ","}] * rows, "params": {"n": 2}})
    await check("rows", lambda: ask(app, "POST", "/score", body.encode(), headers=JSON), 400)


@pytest.mark.parametrize("path", ["/imagine", "/sdapi/v1/progress", "/health", "/nowhere", "/swagger.json"])
@pytest.mark.parametrize("unit", [b"%41", b"a=1&", b"prompt=p&", b"a", b"+", b"&"])
async def test_a_long_query_holds_nobody_up(app: Any, path: str, unit: bytes) -> None:
    await check(path, lambda: ask(app, "GET", path, query=b"prompt=p" + unit * (BODY_BYTES // len(unit))), 431)
    longest = b"prompt=" + unit * ((MAX_HEAD_BYTES - 100) // len(unit))
    await check(path, lambda: ask(app, "GET", path, query=longest), 200, 400, 404, 422)


@pytest.mark.parametrize("name", ["Accept", "X-Request-Id", "Content-Type", "Cookie", "X-Ms-Client-Request-Id"])
@pytest.mark.parametrize("unit", ["image/png;q=0,", ";q=1", "a", ", "])
async def test_a_long_header_holds_nobody_up(app: Any, name: str, unit: str) -> None:
    body = b'{"inputs": "p"}'
    for size, statuses in ((BODY_BYTES, (431, 400)), (MAX_HEAD_BYTES - 200, (200, 400, 406, 415))):
        headers = (*(JSON if name != "Content-Type" else ()), (name, unit * (size // len(unit))))
        work = lambda headers=headers: ask(app, "POST", "/hugging-face/text-to-image", body, headers=headers)  # noqa: E731
        await check(name, work, *statuses)


async def test_an_answer_of_large_pictures_holds_nobody_up() -> None:
    picture = "a" * 8 * 2**20  # the largest, in base64, of noise
    held_s, response = await longest_hold_s(lambda: json_response(lambda: {"data": [{"b64_json": picture}] * 10}))
    assert len(response.body) > 80 * 2**20 and response.body.startswith(b'{"data":[{"b64_json":"aaa')
    assert held_s < MAX_HOLD_S, f"held for {held_s * 1000:.0f} ms"


async def test_health_answers_while_large_bodies_of_every_format_arrive(app: Any) -> None:
    bodies = [
        (path, in_place(place, value))
        for path, places in PLACES.items()
        for place, value in ((places[0], REFUSED["rows"]), (places[1], READ["keys"]), (places[2], LONG["letters"]))
    ]
    answered = 0

    async def look() -> None:
        nonlocal answered
        while True:
            status, _ = await ask(app, "GET", "/health")
            assert status == 200
            answered += 1
            await asyncio.sleep(0.005)

    async def arrive() -> list[tuple[int, bytes]]:
        looking = asyncio.create_task(look())
        answers = await asyncio.gather(*(ask(app, "POST", path, body, headers=JSON) for path, body in bodies))
        looking.cancel()
        return answers

    held_s, answers = await longest_hold_s(arrive)
    assert {status for status, _ in answers} <= {200, 400, 404}
    assert held_s < MAX_HOLD_S, f"held for {held_s * 1000:.0f} ms"
    assert answered >= 5
