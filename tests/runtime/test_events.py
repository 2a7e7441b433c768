from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.request.schema import GeneratedImage, ImageReady, Progress, StageName
from serve_app.runtime.events import PROGRESS_INTERVAL_S, Coalesced, Event, EventStream
from serve_app.runtime.pipeline import LatentPreview

LATENTS = np.zeros((4, 1, 1), np.float32)
PICTURE = GeneratedImage(b"p", 1, "png", 8, 8)
STAGES: tuple[StageName, ...] = ("encode", "denoise", "refine", "decode")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, image: int = 0, stage: StageName = "denoise") -> Progress:
    return Progress(stage, image, number, 50)


def drained(events: Coalesced) -> list[Event]:
    taken = []
    while (event := events.take()) is not None:
        taken.append(event)
    return taken


def test_the_latest_step_wins_and_one_is_told_every_tenth_of_a_second() -> None:
    clock = Clock()
    events = Coalesced(clock)
    told = []
    for number in range(1, 501):  # five seconds of a hundred steps a second
        events.put(step(number))
        told += drained(events)
        assert len(events) <= 1
        clock.now += 0.01
    assert 45 <= len(told) <= 5.0 / PROGRESS_INTERVAL_S + 1
    assert told[0] == step(1) and told == sorted(told, key=lambda event: event.step)  # type: ignore[union-attr]


def test_what_waits_says_when_it_may_be_told() -> None:
    clock = Clock()
    events = Coalesced(clock)
    assert events.wait_s() is None
    events.put(step(1))
    assert events.wait_s() == 0.0 and events.take() == step(1)
    events.put(step(2))
    assert events.take() is None and events.wait_s() == pytest.approx(PROGRESS_INTERVAL_S)
    clock.now += PROGRESS_INTERVAL_S
    assert events.wait_s() == 0.0 and events.take() == step(2)


def test_the_last_of_a_stage_comes_before_the_next_stage_and_the_picture() -> None:
    events = Coalesced(Clock())
    told = []
    for event in (
        *(step(number) for number in range(1, 9)), step(1, stage="refine"), step(2, stage="refine"),
        Progress("decode"), ImageReady(0, PICTURE),
    ):  # fmt: skip
        events.put(event)
        told += drained(events)
    assert told == [
        step(1), step(8), step(2, stage="refine"), Progress("decode"), ImageReady(0, PICTURE),
    ]  # fmt: skip


def test_a_picture_does_not_wait_for_the_progress_of_others() -> None:
    events = Coalesced(Clock())
    events.put(step(1))
    assert events.take() == step(1)
    events.put(step(2, image=1))
    events.put(ImageReady(0, PICTURE))
    assert drained(events) == [ImageReady(0, PICTURE)] and len(events) == 1


def test_every_picture_of_a_request_is_told_of() -> None:
    clock = Clock()
    events = Coalesced(clock)
    told: Counter[int] = Counter()
    for number in range(1, 301):
        for image in range(10):
            events.put(step(number, image))
        told.update(event.image for event in drained(events))
        clock.now += 0.01
    assert 27 <= sum(told.values()) <= 31
    assert len(told) == 10 and max(told.values()) - min(told.values()) <= 1, "in turn"


def test_the_end_gives_out_what_waits() -> None:
    events = Coalesced(Clock())
    for image in range(3):
        events.put(step(1, image))
    assert len(drained(events)) == 1
    events.finish()
    assert drained(events) == [step(1, 1), step(1, 2)]


@st.composite
def lives(draw: st.DrawFn) -> list[Event]:
    """The events of up to four images, each in its own order, mixed."""
    images = draw(st.integers(1, 4))
    own: list[list[Event]] = []
    for image in range(images):
        events: list[Event] = []
        previews = 0
        for stage in STAGES:
            for number in range(draw(st.integers(1, 5))):
                events.append(step(number, image, stage))
                if previews < 3 and draw(st.booleans()):
                    events.append(LatentPreview(image, previews, LATENTS))
                    previews += 1
        own.append([*events, ImageReady(image, PICTURE)])
    mixed = []
    while any(own):
        chosen = draw(st.sampled_from([events for events in own if events]))
        mixed.append(chosen.pop(0))
    return mixed


@given(lives(), st.data())
def test_whatever_comes_little_waits_and_nothing_that_matters_is_lost(life: list[Event], data: st.DataObject) -> None:
    clock = Clock()
    events = Coalesced(clock)
    told: list[Event] = []
    for event in life:
        events.put(event)
        assert len(events) <= 4 * (4 + 3 + 1)
        if data.draw(st.booleans()):
            told += drained(events)
            clock.now += data.draw(st.sampled_from([0.0, 0.03, 0.2]))
    events.finish()
    told += drained(events)
    for image in range(4):
        mine, all_mine = ([event for event in source if event.image == image] for source in (told, life))
        kept = [event for event in mine if not isinstance(event, Progress)]
        assert kept == [event for event in all_mine if not isinstance(event, Progress)], (
            "no picture and no preview is lost"
        )
        steps = [event for event in mine if isinstance(event, Progress)]
        order = [event for event in all_mine if isinstance(event, Progress)]
        places = [order.index(event) for event in steps]
        assert places == sorted(set(places)), "in order, none twice"
        last = {event.stage: event for event in order}
        assert set(last.values()) <= set(steps), "the last of each stage is told"
        if mine:
            assert isinstance(mine[-1], ImageReady), "the picture comes after its progress"


async def test_a_reader_waits_for_events_and_for_their_time() -> None:
    stream = EventStream()
    told: list[tuple[float, Event]] = []

    async def read() -> None:
        async for event in stream:
            told.append((time.monotonic(), event))

    async with asyncio.timeout(20):
        reading = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        for number in range(1, 31):
            stream.put(step(number))
            await asyncio.sleep(0.01)
        while told[-1][1] != step(30):  # in its time, though nothing comes after it
            await asyncio.sleep(0.01)
        apart = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(told)]
        assert len(apart) >= 2 and min(apart) > PROGRESS_INTERVAL_S * 0.9
        stream.put(step(31))
        stream.close()
        await reading
    assert told[-1][1] == step(31)


async def test_an_unread_stream_stays_small() -> None:
    stream = EventStream()
    for number in range(10_000):
        stream.put(step(number % 50, number % 10))
    assert len(stream) == 10
