"""Server-sent events of the generations route, over stages without models."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from typing import Any

import httpx
import pytest

from serve_app.http.app import build_http_app
from serve_app.pictures.files import read_parameters
from serve_app.runtime.tasks import DenoiseTask, Latents, OnStep, StepReport
from tests.fakes import FakeStages, service
from tests.http.test_app import GENERATIONS, a_client, openai_error, post


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of each event; its name is its type."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        if "type" in events[-1]:
            assert name == f"event: {events[-1]['type']}"
        else:
            assert name == "event: error"
    return events


async def test_a_plain_stream_is_one_completed_event_a_picture() -> None:
    body = {"prompt": "p", "seed": 5, "n": 2, "stream": True, "size": "72x64", "output_format": "webp", "quality": "hd"}
    response = await post(FakeStages(warnings=("cut",)), GENERATIONS, body)
    events = events_of(response)
    assert [event["type"] for event in events] == ["image_generation.completed"] * 2
    for event in events:
        picture = read_parameters(base64.b64decode(event["b64_json"]))
        assert picture is not None and picture["seed"] == event["seed"] == 5 + event["image_index"]
        assert (event["size"], event["output_format"], event["background"]) == ("72x64", "webp", "opaque")
        assert event["created_at"] > 1_700_000_000
    assert sorted(event["image_index"] for event in events) == [0, 1]
    assert "warnings" not in events[0]
    assert events[1]["warnings"] == ["quality has no effect on SDXL", "cut"]
    assert [timing["stage"] for timing in events[1]["timings"]] == ["encode", "denoise", "refine", "decode"]
    assert json.loads(response.headers["x-sdxl-warnings"]) == ["quality has no effect on SDXL"], "what was known then"
    assert response.headers["x-request-id"]


async def test_previews_come_before_their_picture() -> None:
    body = {"prompt": "p", "seed": 5, "stream": True, "partial_images": 2, "high_noise_frac": 0.5}
    first, second, last = events_of(await post(FakeStages(), GENERATIONS, body))
    for number, event in enumerate((first, second)):
        assert event["type"] == "image_generation.partial_image"
        assert (event["partial_image_index"], event["image_index"], event["size"]) == (number, 0, "64x64")
        assert base64.b64decode(event["b64_json"]).startswith(b"\x89PNG")
    assert last["type"] == "image_generation.completed"


async def test_progress_is_told_to_those_who_ask() -> None:
    events = events_of(await post(FakeStages(), GENERATIONS, {"prompt": "p", "stream": True, "progress": True}))
    told = [(event["stage"], event["step"], event["steps"]) for event in events[:-1]]
    assert told == [("encode", 0, 0), ("denoise", 2, 2), ("refine", 1, 1), ("decode", 0, 0)]
    assert {event["type"] for event in events[:-1]} == {"image_generation.progress"}
    assert all(event["queue_position"] is None for event in events[:-1])


@pytest.mark.parametrize(
    ("body", "status"),
    [({"prompt": "p", "stream": True, "width": 5000}, 400), ({"prompt": "p", "stream": True, "n": 3}, 400)],
)
async def test_what_can_be_refused_is_refused_with_a_status(body: dict[str, Any], status: int) -> None:
    fake = FakeStages()
    async with a_client(service(fake, max_images_in_flight=2)) as client:
        response = await client.post(GENERATIONS, json=body)
    assert response.status_code == status
    assert openai_error(response)["param"]
    assert fake.calls == []


async def test_a_full_service_says_so_before_it_streams() -> None:
    fake = FakeStages(gate=asyncio.Event())
    images = service(fake, max_images_in_flight=1)
    async with a_client(images) as client:
        first = asyncio.create_task(client.post(GENERATIONS, json={"prompt": "p"}))
        await fake.entered.wait()
        response = await client.post(GENERATIONS, json={"prompt": "p", "stream": True})
        assert (response.status_code, openai_error(response)["code"]) == (503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert fake.gate is not None
        fake.gate.set()
        assert (await first).status_code == 200


async def test_a_fault_on_the_way_is_an_event_that_leaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeStages(fail={"refine": RuntimeError("secret at /srv/models/base")})
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        response = await post(fake, GENERATIONS, {"prompt": "p", "stream": True}, **{"X-Request-Id": "mine"})
    (event,) = events_of(response)
    assert list(event) == ["error"]
    assert set(event["error"]) == {"message", "type", "param", "code"}
    assert "mine" in event["error"]["message"] and "secret" not in response.text
    assert "secret" in caplog.text


async def test_a_client_that_reads_nothing_is_drawn_and_held_little_of() -> None:
    """Its socket takes one piece and no more for a while, over denoisers that tell a thousand steps."""

    class Talkative(FakeStages):
        async def _denoise(self, task: DenoiseTask, on_step: OnStep | None) -> Latents:
            assert on_step is not None
            for step in range(1, 1_001):
                on_step(StepReport(step, 1_000))
                if step % 10 == 0:
                    await asyncio.sleep(0)
            return await super()._denoise(task, on_step)

    images = service(Talkative())
    body = json.dumps({"prompt": "p", "stream": True, "progress": True, "n": 2, "seed": 1}).encode()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]
    reads, sent = asyncio.Event(), bytearray()
    blocked = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        if sent:
            blocked.set()
            await reads.wait()
        sent.extend(message.get("body", b""))

    async with asyncio.timeout(20):
        serving = asyncio.create_task(build_http_app(images)(_scope(), receive, send))
        await blocked.wait()
        while images.admission.in_flight:
            await asyncio.sleep(0.001)
        reads.set()
        await serving
    blocks = [block.split("\ndata: ") for block in sent.decode().removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data) for _, data in blocks]
    for image in (0, 1):
        mine = [(event.get("stage"), event.get("step")) for event in events if event["image_index"] == image]
        assert mine[-1] == (None, None), "the picture comes last"
        told = [one for one in mine[:-1] if one[0] != "encode"]
        assert told[-3:] == [("denoise", 2), ("refine", 1), ("decode", 0)], "after the last of each stage"
    assert len(events) <= 2 * (3 + 1) + 3


async def test_a_client_that_goes_away_frees_its_slots() -> None:
    fake = FakeStages(gate=asyncio.Event())
    images = service(fake)
    app = build_http_app(images)
    body = json.dumps({"prompt": "p", "stream": True, "progress": True, "n": 2, "seed": 1}).encode()
    gone = asyncio.Event()
    inbox = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with asyncio.timeout(20):
        serving = asyncio.create_task(app(_scope(), receive, send))
        await fake.entered.wait()
        assert images.admission.in_flight == 2
        gone.set()
        await serving
        while images.admission.in_flight:
            await asyncio.sleep(0)
    assert sorted(fake.cancelled) == ["denoise 1", "denoise 2"]
    assert sent[0]["status"] == 200


def _scope() -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": GENERATIONS, "raw_path": GENERATIONS.encode(), "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
