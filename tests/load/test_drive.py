"""The load generator against a real server on a port of its own."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.load.arrivals import Bursts, Closed, Poisson
from serve_app.load.drive import Load, Settings, drive, reachable
from serve_app.load.mixes import MIXES, Kind, RequestMix
from serve_app.load.records import Record
from serve_app.request.errors import ConfigurationError
from tests.load.server import FakeService, serving


def mix(prompt: str = "a red circle", n: int = 1) -> RequestMix:
    return RequestMix(kinds=(Kind(num_inference_steps=(5,), n=(n,)),), prompts=(prompt,))


def settings(url: str, **given: Any) -> Settings:
    usual: dict[str, Any] = {"mix": mix(), "arrivals": Closed(1), "requests": 1, "timeout_s": 20.0}
    return Settings(url=url, **(usual | given))


async def one(service: FakeService, prompt: str, **given: Any) -> Record:
    (record,) = await drive(settings(service.url, mix=mix(prompt), **given))
    return record


async def test_a_body_is_openais_and_its_answer_is_read() -> None:
    with serving(FakeService(denoise_s=0.05)) as service:
        (record,) = await drive(settings(service.url + "/", mix=mix(n=2)))
    (body,) = service.bodies
    assert body["response_format"] == "b64_json" and body["n"] == 2 and body["num_inference_steps"] == 5
    assert "stream" not in body and "partial_images" not in body
    assert record.ok and record.status == 200 and record.images == 2 and record.steps == 5
    assert record.stages_s == pytest.approx(
        {"encode": 0.0031, "denoise": 0.05, "refine": 0.002, "decode": 0.001, "queue": 0.0055}
    )
    assert record.sent_s is not None and record.first_byte_s is not None and record.finished_s is not None
    assert record.scheduled_s <= record.sent_s <= record.first_byte_s <= record.finished_s
    assert record.latency_s is not None and record.latency_s >= 0.05


async def test_a_full_service_says_when_to_come_back() -> None:
    with serving(FakeService()) as service:
        record = await one(service, "full")
    assert (record.ok, record.status, record.retry_after_s) == (False, 503, 7.0)
    assert record.error == "HTTP 503: the service is full"
    assert record.latency_s is None and record.finished_s is not None


async def test_other_faults_are_one_line_in_their_record() -> None:
    with serving(FakeService()) as service:
        assert (await one(service, "bad")).error == "HTTP 400: steps: too many"
        assert (await one(service, "no picture")).error == "the answer holds 0 of 1 pictures"
        dropped = await one(service, "dropped")
        assert not dropped.ok and dropped.error.startswith("RemoteProtocolError: ")
    gone = await one(service, "a red circle")
    assert (gone.ok, gone.status) == (False, None) and gone.error.startswith("ConnectError: ")


async def test_a_client_goes_away_at_its_time_out() -> None:
    with serving(FakeService()) as service:
        record = await one(service, "hang", timeout_s=0.2)
        assert record.error == "no answer within 0.2 s" and not record.ok
        assert record.finished_s is not None and 0.2 <= record.finished_s < 20
    assert service.gone == 1


async def test_a_stream_gives_the_first_preview() -> None:
    with serving(FakeService(denoise_s=0.4)) as service:
        (record,) = await drive(settings(service.url, stream=True, partial_images=2, mix=mix(n=2)))
    (body,) = service.bodies
    assert body["stream"] is True and body["partial_images"] == 2
    assert record.ok and record.stages_s == {"encode": 0.25, "denoise": 2.0, "queue": 0.75}
    assert record.first_preview_s is not None and record.finished_s is not None
    # Two pictures of 0.4 s and more each; the first preview is a quarter of 0.4 s into the first.
    assert 0.1 <= record.first_preview_s < record.finished_s - 0.4


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("fails midway", "error event: a stage was lost"),
        ("ends early", "the stream ended after 0 of 1 pictures"),
        ("full", "HTTP 503: the service is full"),
    ],
)
async def test_a_stream_that_fails_says_so(prompt: str, error: str) -> None:
    with serving(FakeService()) as service:
        record = await one(service, prompt, stream=True)
    assert record.error == error and not record.ok


async def test_a_service_that_does_not_stream_is_found_out() -> None:
    with serving(FakeService()) as service:
        service._events = None  # type: ignore[assignment, method-assign]
        record = await one(service, "no picture", stream=True)
    assert record.error == "asked for a stream, got one body"


async def test_an_open_loop_waits_for_no_answer() -> None:
    with serving(FakeService(denoise_s=5.0)) as service:
        records = await drive(settings(service.url, arrivals=Poisson(500.0), requests=20))
    assert service.most_in_flight == 20  # all were due long before the first was answered
    for record in records:
        assert record.ok and record.sent_s is not None and record.sent_s >= record.scheduled_s


async def test_bursts_come_when_due() -> None:
    with serving(FakeService()) as service:
        records = await drive(settings(service.url, arrivals=Bursts(3, 0.2), requests=None, duration_s=0.5, warmup=2))
    assert [record.scheduled_s for record in records] == [0.0] * 3 + [0.2] * 3 + [0.4] * 3
    assert [record.measured for record in records] == [False] * 2 + [True] * 7
    for record in records:
        assert record.sent_s is not None and record.sent_s >= record.scheduled_s


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    seen: list[Load] = []
    with serving(FakeService(denoise_s=0.05)) as service:
        records = await drive(settings(service.url, arrivals=Closed(3), requests=10, warmup=4), seen.append)
    assert service.most_in_flight == 3 and len(service.bodies) == 10
    assert [record.place for record in records] == list(range(10))
    assert sum(record.measured for record in records) == 6
    assert (seen[-1].finished, seen[-1].failed, seen[-1].in_flight) == (10, 0, 0)


async def test_a_steady_loop_is_full_until_the_last_measured_one_ends() -> None:
    under_way: list[int] = []
    with serving(FakeService(denoise_s=0.1)) as service:
        arrivals = settings(service.url, arrivals=Closed(4), requests=9, warmup=2, steady=True)
        records = await drive(arrivals, lambda load: under_way.append(load.in_flight))
    measured = [record for record in records if record.measured]
    assert [record.place for record in measured] == list(range(2, 9))
    last = max(record.finished_s or 0.0 for record in measured)
    for ending in measured:  # the one that ends and those that were sent before and end after it
        end = ending.finished_s or 0.0
        assert sum((other.sent_s or 0.0) < end <= (other.finished_s or 0.0) for other in records) >= 3
    assert len(records) > 9 and all((record.sent_s or 0.0) <= last + 0.001 for record in records), "no longer than that"
    assert max(under_way) == 4


async def test_a_duration_bounds_a_closed_loop() -> None:
    with serving(FakeService(denoise_s=0.05)) as service:
        records = await drive(settings(service.url, arrivals=Closed(2), requests=None, duration_s=0.3))
    assert 2 <= len(records) <= 12 and max(record.finished_s or 0.0 for record in records) >= 0.3
    assert all(record.scheduled_s < 0.3 and record.ok for record in records)


async def test_two_runs_ask_the_same() -> None:
    with serving(FakeService()) as service:
        for _ in range(2):
            await drive(settings(service.url, mix=MIXES["mixed"], requests=5, seed=4))
    assert service.bodies[:5] == service.bodies[5:]


async def test_nothing_there_is_one_line() -> None:
    with pytest.raises(ConfigurationError, match=r"http://127\.0\.0\.1:9: ConnectError"):
        await reachable("http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="not an http:// or https:// address"):
        await reachable("127.0.0.1:8000")
