"""Reading answers: what services send, and what broken ones might."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.load.wire import (
    Event,
    EventReader,
    StreamedAnswer,
    body_fault,
    error_line,
    read_retry_after,
    read_server_timing,
    read_timings,
)


def test_server_timing_in_seconds() -> None:
    header = "encode;dur=3.1, denoise;dur=1200.4, refine;dur=300.2, decode;dur=40.0, queue;dur=12.0"
    assert read_server_timing(header) == pytest.approx(
        {"encode": 0.0031, "denoise": 1.2004, "refine": 0.3002, "decode": 0.04, "queue": 0.012}
    )
    assert read_server_timing('cache;desc="a hit", db;desc="x";dur=53') == {"db": 0.053}
    assert read_server_timing("") == {}


def test_timings_of_an_event() -> None:
    timings = [
        {"stage": "encode", "seconds": 0.25, "queue_seconds": 0.0},
        {"stage": "denoise", "seconds": 2.0, "queue_seconds": 0.5},
    ]
    assert read_timings(timings) == {"encode": 0.25, "denoise": 2.0, "queue": 0.75}
    assert read_timings([{"stage": "denoise", "seconds": 2.0}]) == {"denoise": 2.0}


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), (None, None), ("Wed, 21 Oct 2015 07:28:00 GMT", None)])
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header) == seconds


def test_errors_are_one_line() -> None:
    assert error_line(b'{"error": {"message": "the service is full"}}', 503) == "HTTP 503: the service is full"
    assert error_line(b"Request timed out\nafter 3 s", 408) == "HTTP 408: Request timed out"
    assert error_line(b"", 502) == "HTTP 502"


def test_bodies() -> None:
    picture = {"b64_json": "AAAA"}
    assert body_fault(json.dumps({"data": [picture]}).encode(), 1) == ""
    assert body_fault(json.dumps({"data": [picture, {"b64_json": None}]}).encode(), 2) == (
        "the answer holds 1 of 2 pictures"
    )
    for body in (b"", b"[]", b'{"data": [1]}', b"{}"):
        assert body_fault(body, 1) == "the answer is not OpenAI's"


names = st.text(st.characters(categories=["L"]), min_size=1)
lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))


@given(st.lists(st.tuples(names, st.lists(lines, min_size=1))))
def test_events_read_back(events: list[tuple[str, list[str]]]) -> None:
    reader = EventReader()
    stream = [": a comment"]
    for name, data in events:
        stream += [f"event: {name}", *(f"data: {line}" for line in data), ""]
    read = [event for line in stream if (event := reader.feed(line)) is not None]
    assert read == [Event(name, "\n".join(data)) for name, data in events]


def test_an_event_without_data_or_end_is_none() -> None:
    reader = EventReader()
    assert [reader.feed(line) for line in ("event: x", "", "data:1")] == [None] * 3
    assert reader.feed("") == Event("message", "1")


def _event(name: str, **data: object) -> Event:
    return Event(name, json.dumps(data))


PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"


def test_a_streamed_answer_of_two_pictures() -> None:
    answer = StreamedAnswer(images=2)
    answer.take(_event(PARTIAL, b64_json="A", partial_image_index=0))
    answer.take(_event("progress", step=1, steps=5))
    answer.take(_event(COMPLETED, b64_json="A", timings=[{"stage": "denoise", "seconds": 1.5}]))
    assert answer.previews == 1 and answer.fault() == "the stream ended after 1 of 2 pictures"
    answer.take(_event(COMPLETED, b64_json="B"))
    assert answer.fault() == "" and answer.stages_s == {"denoise": 1.5}


@pytest.mark.parametrize(
    ("event", "fault"),
    [
        (_event("error", error={"message": "a stage was lost"}), "error event: a stage was lost"),
        (_event("error", error="lost"), "error event: lost"),
        (_event(COMPLETED, error={"message": "x"}), "error event: x"),
        (_event(COMPLETED, b64_json=""), f"{COMPLETED} without a picture"),
        (_event(PARTIAL), f"{PARTIAL} is not OpenAI's"),
        (Event(COMPLETED, "{"), f"{COMPLETED} is not OpenAI's"),
        (Event("error", "[]"), "error is not OpenAI's"),
    ],
)
def test_a_broken_stream_says_so(event: Event, fault: str) -> None:
    answer = StreamedAnswer(images=1)
    answer.take(event)
    assert answer.fault() == fault
