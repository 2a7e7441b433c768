"""The Python client, sync and async, against a real server over stages without models; and its rules of retrying."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from email.utils import formatdate
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.client.client import AsyncClient, Client, ServiceUnreachable, StreamBroken, UnexpectedAnswer
from serve_app.client.wire import MAX_WAIT_S, StreamReader
from serve_app.formats.openai import wire as openai
from serve_app.formats.sse import encode_event
from serve_app.http.app import build_http_app
from serve_app.pictures.files import read_parameters
from serve_app.request.errors import (
    InternalError,
    InvalidRequest,
    Overloaded,
    PictureFailed,
    RequestKillsReplica,
    RouteNotFound,
    ServiceError,
    StageUnavailable,
)
from serve_app.request.schema import (
    GeneratedImage,
    ImageReady,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StageTiming,
)
from serve_app.runtime.service import ImageService
from tests.fakes import FakeStages, service
from tests.http.web_server import Serving, serving


class World:
    """A server over fakes, and the service behind it to look at."""

    def __init__(self, images: ImageService, server: Serving) -> None:
        self.images, self.server, self.url = images, server, server.url

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "did not happen"
            time.sleep(0.005)


@contextmanager
def world_of(fake: FakeStages, **limits: int) -> Iterator[World]:
    images = service(fake, **limits)
    with serving(build_http_app(images)) as server:
        yield World(images, server)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of(FakeStages(warnings=("cut",))) as up:
        yield up


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client would have slept."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("serve_app.client.client.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr("serve_app.client.client.asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("serve_app.client.wire.random", SimpleNamespace(uniform=lambda low, high: low))
    return slept


ASKED: dict[str, Any] = {"seed": 5, "n": 2, "width": 72, "output_format": "webp", "high_noise_frac": 0.5}


def check_result(result: ImageResult) -> None:
    assert [image.seed for image in result.images] == [5, 6]
    for image in result.images:
        assert (image.width, image.height, image.output_format) == (72, 64, "webp")
        assert image.to_pil().size == (72, 64)
        parameters = read_parameters(image.data)
        assert parameters is not None and parameters["seed"] == image.seed and parameters["prompt"] == "a kite — ✓"
    assert result.warnings == ["cut"]
    assert [timing.stage for timing in result.timings] == ["encode", "denoise", "refine", "decode"]
    assert [timing.steps for timing in result.timings] == [0, 2, 1, 0]
    assert result.request_id and result.created > 1_700_000_000


def test_generate(world: World) -> None:
    with Client(world.url) as client:
        check_result(client.generate("a kite — ✓", **ASKED))
        request = ImageRequest(prompt="a kite — ✓", **ASKED)
        check_result(client.generate(request))
        assert client.generate(request, n=1, seed=9).images[0].seed == 9


async def test_generate_async(world: World) -> None:
    async with AsyncClient(world.url + "/") as client:
        check_result(await client.generate(ImageRequest(prompt="a kite — ✓", **ASKED)))
        results = await asyncio.gather(*(client.generate("p", seed=seed) for seed in range(120)))
    assert [result.images[0].seed for result in results] == list(range(120)), "no pool holds them back"


def check_events(events: list[Any]) -> None:
    *way, result = events
    assert isinstance(result, ImageResult)
    check_result(result)
    assert [event.stage for event in way if isinstance(event, Progress) and event.image == 0] == [
        "encode", "denoise", "refine", "decode"
    ]  # fmt: skip
    assert Progress("denoise", 1, 2, 2) in way
    previews = [event for event in way if isinstance(event, PartialImage)]
    assert sorted((event.image, event.index) for event in previews) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all((event.width, event.height, event.output_format) == (72, 64, "webp") for event in previews)
    ready = {event.image: event.picture for event in way if isinstance(event, ImageReady)}
    assert [ready[index] for index in (0, 1)] == result.images


def test_stream(world: World) -> None:
    with Client(world.url) as client:
        check_events(list(client.stream("a kite — ✓", partial_images=2, **ASKED)))
        quiet = list(client.stream("p", progress=False))
    assert [type(event) for event in quiet] == [ImageReady, ImageResult]


async def test_stream_async(world: World) -> None:
    async with AsyncClient(world.url) as client:
        stream = client.stream(ImageRequest(prompt="a kite — ✓", **ASKED), partial_images=2)
        check_events([event async for event in stream])


async def test_models_and_health(world: World) -> None:
    with Client(world.url) as client:
        assert client.models() == list(world.images.config.model_names)
        assert client.health()["status"] == "ok"
        assert client.info().native_size_px == world.images.facts.base.native_size_px
    async with AsyncClient(world.url) as client:
        assert await client.models() == list(world.images.config.model_names)
        assert (await client.health())["images_in_flight"] == 0
        assert (await client.info()).max_side_px == world.images.config.limits.max_side_px


def test_what_the_definition_refuses_is_never_sent() -> None:
    client = Client("http://127.0.0.1:9")  # where nobody listens
    for fields in ({"width": 100}, {"widht": 64}, {"partial_images": 4}):
        with pytest.raises(InvalidRequest) as error:
            list(client.stream("p", **fields))
        assert error.value.param == next(iter(fields))
    with pytest.raises(InvalidRequest):
        client.generate(ImageRequest(prompt="p"), seed=-1)


async def test_what_the_service_refuses_is_raised_as_its_own_error(world: World) -> None:
    with Client(world.url) as client:
        for call in (lambda: client.generate("p", width=8000), lambda: list(client.stream("p", width=8000))):
            with pytest.raises(InvalidRequest, match="outside this service's") as error:
                call()
            assert (error.value.param, error.value.status, error.value.retry_after_s) == ("width", 400, None)
            assert "\n" not in str(error.value)
    async with AsyncClient(world.url) as client:
        with pytest.raises(InvalidRequest, match="outside this service's"):
            await client.generate("p", height=8000)
    with Client(world.url + "/elsewhere") as client, pytest.raises(RouteNotFound) as not_found:
        client.models()
    assert not_found.value.status == 404


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (PictureFailed("not finite"), PictureFailed),
        (RuntimeError("secret"), InternalError),
    ],
)
def test_a_fault_on_the_way_is_not_tried_again(fault: Exception, kind: type[ServiceError], waits: list[float]) -> None:
    fake = FakeStages(fail={"refine": fault})
    with world_of(fake) as up, Client(up.url) as client:
        with pytest.raises(kind) as error:
            client.generate("p", high_noise_frac=0.5)
        assert "secret" not in str(error.value) and error.value.retry_after_s is None
    assert waits == [] and fake.calls.count("encode") == 1


@pytest.mark.parametrize("fault", [StageUnavailable("lost", retry_after_s=5), Overloaded("full", retry_after_s=1)])
def test_a_stage_that_is_being_replaced_is_asked_again(fault: ServiceError, waits: list[float]) -> None:
    """By `generate`, which has handed nothing out; a stream that has begun is its reader's to ask for again."""
    fake = FakeStages(fail={"decode": fault})
    with world_of(fake) as up, Client(up.url, max_retries=3) as client:
        with pytest.raises(type(fault), match=fault.message) as error:
            client.generate("p")
        assert fake.calls.count("encode") == 4 and waits == [1.0] * 3
        assert error.value.status == 503
        with pytest.raises(type(fault)):
            list(client.stream("p"))
        assert fake.calls.count("encode") == 5


def test_a_full_service_is_asked_again_when_it_says(waits: list[float]) -> None:
    fake = FakeStages(gate=asyncio.Event())
    with world_of(fake, max_images_in_flight=1) as up, Client(up.url) as client:
        first = threading.Thread(target=Client(up.url).generate, args=("p",))
        first.start()
        up.until(lambda: up.images.admission.in_flight == 1)
        with pytest.raises(Overloaded) as error:
            client.generate("p")
        assert error.value.retry_after_s is not None and error.value.retry_after_s >= 1
        assert waits == [error.value.retry_after_s] * 2, "two retries, each after the time that the service named"
        assert fake.gate is not None
        up.server.call(fake.gate.set)
        first.join(20)
        assert client.generate("p").images, "and then it takes it"


# A hand-made service: one answer after the other, the last for ever.
class Script:
    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.asked = list(answers), 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content, request=request)

    def sync(self, **options: Any) -> Client:
        return Client("http://service", transport=httpx.MockTransport(self), **options)

    def asynchronous(self, **options: Any) -> AsyncClient:
        return AsyncClient("http://service", transport=httpx.MockTransport(self), **options)


def refusal(error: ServiceError, **headers: str) -> httpx.Response:
    return httpx.Response(error.status, json=openai.encode_error(error), headers=headers)


RESULT = ImageResult(
    [GeneratedImage(b"first", 3, "png", 8, 16), GeneratedImage(b"second", 2**63 - 1, "png", 8, 16)],
    ["one", "two"],
    [StageTiming("encode", 0.25), StageTiming("denoise", 1.5, steps=7, queue_seconds=0.125)],
    "id-1",
    1_800_000_000,
    text_tokens=11,
)  # fmt: skip
EVENTS = [
    Progress("encode"),
    Progress("denoise", 1, 0, 0, queue_position=4),
    Progress("denoise", 0, 3, 7),
    PartialImage(0, 0, b"rough", "png", 8, 16),
    ImageReady(1, RESULT.images[1]),
    ImageReady(0, RESULT.images[0]),
    RESULT,
]


def wire(events: list[Any] = EVENTS) -> bytes:
    encoder = openai.StreamEncoder(2, RESULT.created)
    data = [encoded for event in events if (encoded := encoder.encode(event)) is not None]
    return b": hello\n\n" + b": keep-alive\n\n".join(encode_event(item["type"], item) for item in data)


def finished() -> httpx.Response:
    return httpx.Response(200, headers={"Content-Type": "text/event-stream", "X-Request-Id": "id-1"}, content=wire())


@given(st.lists(st.integers(0, 3000), max_size=40), st.booleans())
def test_events_are_read_however_the_bytes_are_cut(cuts: list[int], crlf: bool) -> None:
    data = wire().replace(b"\n", b"\r\n") if crlf else wire()
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    reader = StreamReader(2, "id-1")
    told = [
        event
        for start, end in pairwise(places)
        for event in reader.feed(data[start:end])
    ]  # fmt: skip
    reader.end()
    # The event of the picture that is finished last is also the one that has the result.
    assert told == EVENTS
    assert "first" not in repr(told) and "rough" not in repr(told), "files are not for printing"


async def test_two_pictures_asked_of_a_script() -> None:
    with Script(finished()).sync() as client:
        assert client.generate("p", n=2) == RESULT
    async with Script(finished()).asynchronous() as client:
        assert await client.generate("p", n=2) == RESULT


async def check_tries(script: Script, expected: int, error: type[Exception] | None, **options: Any) -> Any:
    """Both clients make the same number of calls and raise the same error, which is returned."""
    caught = None
    for make in (script.sync, script.asynchronous):
        script.asked = 0
        client = make(**options)
        try:
            result = client.generate("p", n=2)
            if isinstance(client, AsyncClient):
                result = await result
            assert error is None and result == RESULT
        except ServiceError as raised:
            assert error is not None and type(raised) is error, raised
            assert "\n" not in str(raised)
            caught = raised
        assert script.asked == expected
    return caught


async def test_retry_after_is_honoured(waits: list[float]) -> None:
    full = Overloaded("full")
    await check_tries(Script(refusal(full, **{"Retry-After": "7"}), finished()), 2, None)
    assert waits == [7.0, 7.0]
    waits.clear()
    await check_tries(Script(refusal(full), refusal(full), finished()), 3, None)
    assert waits == [1.0] * 4, "a service that names no time"
    waits.clear()
    later = formatdate(time.time() + 60, usegmt=True)
    await check_tries(Script(refusal(full, **{"Retry-After": later}), finished()), 2, None)
    assert all(0 < wait <= 60 for wait in waits) and len(waits) == 2


async def test_what_is_not_tried_again(waits: list[float]) -> None:
    full = Overloaded("full")
    error = await check_tries(Script(refusal(full, **{"Retry-After": str(int(MAX_WAIT_S) + 1)})), 1, Overloaded)
    assert error.retry_after_s == MAX_WAIT_S + 1, "too long: the caller's to decide"
    error = await check_tries(Script(refusal(full, **{"Retry-After": "1", "x-should-retry": "false"})), 1, Overloaded)
    assert error.retry_after_s is None
    await check_tries(Script(refusal(full, **{"Retry-After": "1"})), 1, Overloaded, max_retries=0)
    await check_tries(Script(refusal(InternalError("x"), **{"Retry-After": "1"})), 1, InternalError)
    for status in (400, 404, 408, 409, 429):
        body = {"error": {"message": "no", "type": "invalid_request_error", "param": "prompt", "code": None}}
        answer = httpx.Response(status, json=body, headers={"Retry-After": "1"})
        error = await check_tries(Script(answer), 1, InvalidRequest)
        assert (error.status, error.param) == (status, "prompt")
    assert waits == []


async def test_the_tries_are_counted(waits: list[float]) -> None:
    await check_tries(Script(refusal(Overloaded("full"), **{"Retry-After": "2"})), 4, Overloaded, max_retries=3)
    assert waits == [2.0] * 6


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        (httpx.Response(502, text="<html>Bad Gateway</html>\n<p>"), 1),
        (httpx.Response(503, text="upstream gone"), 3),
        (httpx.Response(408, text="Request timed out"), 1),
        (httpx.Response(200, text="hello"), 1),
        (httpx.Response(200, json={"created": 1}), 1),
        (httpx.Response(200, json=[1]), 1),
        (httpx.Response(302, headers={"Location": "http://elsewhere"}), 1),
        (httpx.Response(200, content=b"data: {}\n\n", headers={"Content-Type": "text/event-stream"}), 1),
        (httpx.Response(200, content=b"data: [1]\n\n", headers={"Content-Type": "text/event-stream"}), 1),
        (httpx.Response(200, content=b"data: nonsense\n\n", headers={"Content-Type": "text/event-stream"}), 1),
    ],
)
async def test_an_answer_of_somebody_else(answer: httpx.Response, tries: int, waits: list[float]) -> None:
    error = await check_tries(Script(answer), tries, UnexpectedAnswer)
    assert "sdxl-serve" in str(error) and "<html>" not in str(error)
    if answer.status_code != 200:
        assert error.status == answer.status_code


async def test_a_plain_500_of_ray_s_proxy_is_a_connection_that_was_cut(waits: list[float]) -> None:
    """An ingress replica died with the request in it."""
    plain = httpx.Response(500, text="Internal Server Error")
    await check_tries(Script(plain, finished()), 2, None)
    error = await check_tries(Script(plain), 3, ServiceUnreachable)
    assert "a process died" in str(error)
    await check_tries(Script(httpx.Response(500, text="a gateway's own")), 1, UnexpectedAnswer)


async def test_a_request_that_kills_replicas_is_not_sent_again(waits: list[float]) -> None:
    error = await check_tries(Script(refusal(RequestKillsReplica("no more"))), 1, RequestKillsReplica)
    assert error.retry_after_s is None and waits == []


async def test_a_connection_that_breaks(waits: list[float]) -> None:
    """Before anything was handed out it is asked again: seeded work is the same work."""
    await check_tries(Script(httpx.RemoteProtocolError("peer left"), finished()), 2, None)
    cut = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=wire(EVENTS[:4]))
    error = await check_tries(Script(cut), 2, StreamBroken)  # once more and no more: a time limit may have cut it
    assert "before the pictures were finished" in str(error)
    script = Script(cut)
    with pytest.raises(ServiceUnreachable):
        list(script.sync().stream("p", n=2))
    assert script.asked == 1, "its reader has had events"
    script = Script(httpx.ReadError("reset"), finished())
    assert list(script.sync().stream("p", n=2)) == EVENTS
    for fault in (httpx.ConnectError("[Errno 111] Connection refused"), httpx.ReadTimeout("")):
        error = await check_tries(Script(fault), 1, ServiceUnreachable)
        assert str(error).startswith("http://service: ")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://a b/\x00", ""])
def test_no_address(url: str) -> None:
    with pytest.raises(ServiceUnreachable) as error:
        Client(url)
    assert "\n" not in str(error.value)


def test_nobody_there() -> None:
    with pytest.raises(ServiceUnreachable, match=r"^http://127\.0\.0\.1:9: .*refused$"):
        Client("http://127.0.0.1:9").generate("p")


def test_a_silent_service_is_given_up() -> None:
    fake = FakeStages(gate=asyncio.Event())
    with (
        world_of(fake) as up,
        Client(up.url, timeout_s=0.3) as client,
        pytest.raises(ServiceUnreachable, match=r"silent for 0\.3 s"),
    ):
        client.generate("p")


def test_leaving_a_stream_frees_the_slots() -> None:
    fake = FakeStages(gate=asyncio.Event())
    with world_of(fake) as up, Client(up.url) as client:
        with closing(client.stream("p", n=3, seed=1)) as stream:
            assert next(stream) == Progress("encode")
            up.until(lambda: len(fake.tasks) == 3)
            assert up.images.admission.in_flight == 3
        up.until(lambda: up.images.admission.in_flight == 0)
        assert sorted(fake.cancelled) == ["denoise 1", "denoise 2", "denoise 3"]
        for _ in client.stream("p", seed=9):
            break  # nobody holds it any more
        up.until(lambda: len(fake.cancelled) == 4 and up.images.admission.in_flight == 0)


@pytest.mark.parametrize("way", ["aclose", "cancel a stream", "cancel generate"])
async def test_leaving_an_async_call_frees_the_slots(way: str) -> None:
    fake = FakeStages(gate=asyncio.Event())
    with world_of(fake) as up:
        async with AsyncClient(up.url) as client:

            async def read() -> None:
                async for _ in client.stream("p", n=2, seed=1):
                    pass

            if way == "aclose":
                async with aclosing(client.stream("p", n=2, seed=1)) as stream:
                    assert await anext(stream) == Progress("encode")
                    await asyncio.to_thread(up.until, lambda: len(fake.tasks) == 2)
            else:
                call = client.generate("p", n=2, seed=1) if way == "cancel generate" else read()
                task = asyncio.ensure_future(call)
                await asyncio.to_thread(up.until, lambda: len(fake.tasks) == 2)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await asyncio.to_thread(up.until, lambda: up.images.admission.in_flight == 0)
    assert sorted(fake.cancelled) == ["denoise 1", "denoise 2"]


def test_headers_and_prefix_travel() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, content=wire())

    transport = httpx.MockTransport(answer)
    with Client("https://host/sdxl/", headers={"Authorization": "Bearer x"}, transport=transport) as client:
        client.generate("p", n=2, crops_coords_top_left=(8, 16))
    assert str(seen[0].url) == "https://host/sdxl/v1/images/generations"
    assert seen[0].headers["authorization"] == "Bearer x"
    body = json.loads(seen[0].content)
    assert body == {
        "prompt": "p", "n": 2, "crops_coords_top_left": [8, 16], "stream": True, "partial_images": 0, "progress": False
    }  # fmt: skip


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ServiceUnreachable("gone", retry_after_s=1.0)))
    assert (type(error), str(error), error.retry_after_s) == (ServiceUnreachable, "gone", 1.0)


def test_the_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) - {"close"} == public(AsyncClient) - {"aclose"}


def test_a_fault_is_the_project_s_own_even_where_ray_has_made_a_class_of_it() -> None:
    script = (
        "from ray.exceptions import RayTaskError; from serve_app.request.errors import StageUnavailable; "
        "kept = RayTaskError('run', 'Traceback', StageUnavailable('lost')).as_instanceof_cause(); "
        "from serve_app.client.wire import _BY_CODE; print(_BY_CODE['stage_unavailable'] is StageUnavailable)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("variable", "url", "named"),
    [
        ("http_proxy", "http://192.0.2.1:8000", ", by the proxy 127.0.0.1:9 that http_proxy names"),
        ("all_proxy", "http://192.0.2.1:8000", ", by the proxy 127.0.0.1:9 that all_proxy names"),
        ("https_proxy", "http://127.0.0.1:9", ""),
        ("http_proxy", "http://excepted.example:9", ""),
    ],
)
async def test_a_proxy_that_refuses_is_named(
    variable: str, url: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "excepted.example")
    with pytest.raises(ServiceUnreachable) as error, Client(url) as client:
        client.health()
    with pytest.raises(ServiceUnreachable) as again:
        async with AsyncClient(url) as asynchronous:
            await asynchronous.health()
    for message in (error.value.message, again.value.message):
        assert (named in message) if named else ("by the proxy" not in message)
        assert message.startswith(f"{url}: ") and "secret" not in message
