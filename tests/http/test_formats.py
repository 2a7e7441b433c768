"""The routes of Hugging Face, webui, Stability and Azure over stages without models; each with its own envelope."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serve_app.config.settings import AppConfig
from serve_app.formats.automatic1111 import status as automatic1111_status
from serve_app.http.app import build_http_app
from serve_app.pictures.files import read_parameters
from serve_app.pictures.infotext import parse_infotext
from serve_app.request.errors import StageUnavailable
from serve_app.runtime.service import ImageService
from tests.fakes import FACTS, FakeStages, service
from tests.http.test_app import JSON, STAGES, a_client, get, post, timing_stages

HUGGING_FACE, TXT2IMG = "/hugging-face/text-to-image", "/sdapi/v1/txt2img"
STABILITY = "/v1/generation/stable-diffusion-xl-1024-v1-0/text-to-image"

BODIES: dict[str, dict[str, Any]] = {
    HUGGING_FACE: {"inputs": "p", "parameters": {"seed": 5}},
    TXT2IMG: {"prompt": "p", "seed": 5, "width": 64, "height": 64},
    STABILITY: {"text_prompts": [{"text": "p"}], "seed": 5},
}


def message(path: str, response: httpx.Response) -> str:
    """What is wrong, in the format's own envelope, one line."""
    body = response.json()
    keys = {
        HUGGING_FACE: ({"error"}, "error"),
        TXT2IMG: ({"error", "detail", "body", "errors"}, "detail"),
        STABILITY: ({"id", "name", "message"}, "message"),
    }
    wanted, key = keys[path]
    assert set(body) == wanted
    assert isinstance(body[key], str) and "\n" not in body[key]
    return str(body[key])


def picture_of(path: str, response: httpx.Response) -> bytes:
    assert response.status_code == 200, response.text
    if path == HUGGING_FACE:
        return response.content
    body = response.json()
    return base64.b64decode(body["images"][0] if path == TXT2IMG else body["artifacts"][0]["base64"])


async def test_under_a_route_prefix_a_wrong_address_has_its_formats_envelope() -> None:
    """As Ray's proxy calls the application: with the prefix in the path, and as `root_path`."""
    transport = httpx.ASGITransport(app=build_http_app(service(FakeStages())), root_path="/img")
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        response = await client.get("/img/sdapi/v1/nothing")
    assert response.status_code == 404
    assert "/img/sdapi/v1/nothing" in message(TXT2IMG, response)


@pytest.mark.parametrize("path", BODIES)
async def test_every_format_gives_the_picture_its_times_and_its_warnings(path: str) -> None:
    response = await post(FakeStages(warnings=("cut",)), path, BODIES[path] | {"oddity": 1}, **{"X-Request-Id": "mine"})
    data = picture_of(path, response)
    assert (read_parameters(data) or {})["seed"] == 5
    assert (np.asarray(Image.open(io.BytesIO(data)))[0, 0] == 5).all(), "FakeStages draws the seed"
    assert timing_stages(response) == [*STAGES, "queue"]
    assert json.loads(response.headers["x-sdxl-warnings"])[0] == "oddity is unknown and was ignored"
    assert json.loads(response.headers["x-sdxl-warnings"])[-1] == "cut"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"{}", b"\xff"])
async def test_a_body_that_asks_for_nothing_is_refused_unqueued(path: str, body: bytes) -> None:
    fake = FakeStages()
    response = await post(fake, path, body)
    assert response.status_code == 400
    assert message(path, response)
    assert fake.calls == []


@pytest.mark.parametrize("path", BODIES)
async def test_every_format_says_what_is_too_large_full_or_broken(path: str) -> None:
    async with a_client(service(FakeStages())) as client:
        response = await client.post(path, content=b" " * (4 * 2**20 + 1), headers=JSON)
        assert (response.status_code, bool(message(path, response))) == (413, True)
    lost = FakeStages(fail={"denoise": StageUnavailable("being replaced", retry_after_s=5)})
    response = await post(lost, path, BODIES[path])
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert message(path, response) == "being replaced"
    response = await post(FakeStages(fail={"decode": RuntimeError("secret")}), path, BODIES[path])
    assert response.status_code == 500 and response.headers["x-should-retry"] == "false"
    assert "secret" not in response.text and message(path, response).startswith("internal error")
    full = FakeStages(gate=asyncio.Event())
    async with a_client(service(full, max_images_in_flight=1)) as client:
        first = asyncio.create_task(client.post(path, json=BODIES[path]))
        await full.entered.wait()
        response = await client.post(path, json=BODIES[path])
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        assert "full" in message(path, response)
        assert full.gate is not None
        full.gate.set()
        assert (await first).status_code == 200


@pytest.mark.parametrize("path", BODIES)
async def test_an_unknown_path_or_method_is_said_in_the_envelope_of_its_neighbours(path: str) -> None:
    assert (response := await get(FakeStages(), path)).status_code == 405
    assert message(path, response)
    near = {HUGGING_FACE: "/hugging-face/x", TXT2IMG: "/sdapi/v1/img2img", STABILITY: "/v1/generation/x/image-to-image"}
    assert (response := await post(FakeStages(), near[path], {})).status_code == 404
    assert message(path, response)


# Hugging Face


@pytest.mark.parametrize(
    ("accept", "media_type", "kind"),
    [("image/png", "image/png", "PNG"), ("image/webp, */*;q=0.1", "image/webp", "WEBP"), ("*/*", "image/png", "PNG")],
)
async def test_accept_decides_the_format(accept: str, media_type: str, kind: str) -> None:
    response = await post(FakeStages(), HUGGING_FACE, BODIES[HUGGING_FACE], Accept=accept)
    assert (response.headers["content-type"], response.headers["vary"]) == (media_type, "Accept")
    assert Image.open(io.BytesIO(response.content)).format == kind
    assert response.headers["x-sdxl-seed"] == "5"


async def test_an_accept_that_no_picture_meets_is_406() -> None:
    fake = FakeStages()
    response = await post(fake, HUGGING_FACE, BODIES[HUGGING_FACE], Accept="text/html")
    assert (response.status_code, bool(message(HUGGING_FACE, response)), fake.calls) == (406, True, [])


async def test_every_warning_is_a_header_that_its_client_logs() -> None:
    response = await post(FakeStages(warnings=("cut",)), HUGGING_FACE, {"inputs": "p", "a": 1, "b": 2})
    assert len(response.headers.get_list("x-hf-warning")) == 3


# webui


async def test_txt2img_draws_batches_with_consecutive_seeds_and_their_infotexts() -> None:
    body = BODIES[TXT2IMG] | {"batch_size": 4, "n_iter": 3, "steps": 20, "negative_prompt": "bad"}
    response = (await post(FakeStages(), TXT2IMG, body)).json()
    pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in response["images"]]
    info = json.loads(response["info"])
    assert info["all_seeds"] == list(range(5, 17)) == [int(np.asarray(picture)[0, 0, 0]) for picture in pictures]
    for picture, text, seed in zip(pictures, info["infotexts"], info["all_seeds"], strict=True):
        for read in (parse_infotext(text), parse_infotext(picture.info["parameters"])):
            assert (read["Prompt"], read["Negative prompt"], read["Seed"], read["Steps"]) == (
                "p",
                "bad",
                str(seed),
                "20",
            )


async def test_progress_is_of_the_oldest_and_nothing_when_idle() -> None:
    fake = FakeStages(gate=asyncio.Event(), held_seed=7)
    async with a_client(service(fake, loopback=True)) as client:
        idle = (await client.get("/sdapi/v1/progress")).json()
        assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
        drawing = asyncio.create_task(client.post(TXT2IMG, json=BODIES[TXT2IMG] | {"seed": 6, "batch_size": 2}))
        await fake.entered.wait()
        async with asyncio.timeout(20):
            while (now := (await client.get("/sdapi/v1/progress")).json())["state"]["job_no"] < 1:
                await asyncio.sleep(0.01)
        assert now["progress"] == 0.5 and now["state"]["job_count"] == 2 and now["state"]["job"] == "txt2img"
        preview = Image.open(io.BytesIO(base64.b64decode(now["current_image"])))
        assert preview.size == (64, 64)
        unseen = (await client.get("/sdapi/v1/progress", params={"skip_current_image": True})).json()
        assert unseen["current_image"] is None
        assert fake.gate is not None
        fake.gate.set()
        assert (await drawing).status_code == 200
        assert (await client.get("/sdapi/v1/progress")).json()["state"]["job_count"] == 0


@pytest.mark.parametrize("path", ["/sdapi/v1/interrupt", "/sdapi/v1/skip"])
async def test_an_interrupted_txt2img_answers_with_what_is_finished_and_frees_the_rest(path: str) -> None:
    fake = FakeStages(gate=asyncio.Event(), held_seed=7)
    images = service(fake, loopback=True)
    async with a_client(images) as client:
        assert (await client.post(path)).json() == {}, "nothing to interrupt is no error"
        drawing = asyncio.create_task(client.post(TXT2IMG, json=BODIES[TXT2IMG] | {"seed": 6, "batch_size": 2}))
        async with asyncio.timeout(20):
            while (await client.get("/sdapi/v1/progress")).json()["state"]["job_no"] < 1:
                await asyncio.sleep(0.01)
            assert (await client.post(path)).status_code == 200
            response = await drawing
        body = response.json()
        assert response.status_code == 200 and len(body["images"]) == 1
        assert json.loads(body["info"])["all_seeds"] == [6]
        assert body["warnings"] == ["interrupted: 1 of 2 pictures were finished"]
    assert fake.cancelled == ["denoise 7"] and images.admission.in_flight == 0


async def test_one_that_is_interrupted_before_its_first_picture_has_none() -> None:
    fake = FakeStages(gate=asyncio.Event())
    async with a_client(service(fake, loopback=True)) as client:
        drawing = asyncio.create_task(client.post(TXT2IMG, json=BODIES[TXT2IMG]))
        await fake.entered.wait()
        await client.post("/sdapi/v1/interrupt")
        async with asyncio.timeout(20):
            body = (await drawing).json()
    assert body["images"] == [] and json.loads(body["info"])["infotexts"] == []


async def begun(client: httpx.AsyncClient, fake: FakeStages, **fields: Any) -> asyncio.Task[httpx.Response]:
    """A txt2img of two pictures, the first of which is finished and the second, of seed 7, is held."""
    drawing = asyncio.create_task(client.post(TXT2IMG, json=BODIES[TXT2IMG] | {"seed": 6, "batch_size": 2} | fields))
    async with asyncio.timeout(20):
        await fake.entered.wait()
        while sum(call.startswith("decode") for call in fake.calls) < 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
    return drawing


async def test_a_client_follows_and_ends_its_own_work_alone() -> None:
    fake = FakeStages(gate=asyncio.Event(), held_seed=7)
    images = service(fake)
    async with a_client(images) as client, asyncio.timeout(20):
        mine = await begun(client, fake, force_task_id="mine")
        theirs = asyncio.create_task(client.post(TXT2IMG, json=BODIES[TXT2IMG] | {"seed": 7, "force_task_id": "b"}))
        while len(fake.tasks) < 4:  # two of the first body, its refiner's, and the second body's
            await asyncio.sleep(0.01)

        async def progress(**query: str) -> dict[str, Any]:
            return dict((await client.get("/sdapi/v1/progress", params=query)).json())

        async def task(**fields: Any) -> dict[str, Any]:
            response = await client.post("/internal/progress", json=fields)
            assert response.status_code == 200
            return dict(response.json())

        while (await progress(id_task="mine"))["state"]["job_no"] < 1:
            await asyncio.sleep(0.01)
        assert (await progress(id_task="mine"))["progress"] == 0.5
        assert (await progress(id_task="b"))["state"]["job_count"] == 1
        idle = automatic1111_status.encode_progress(None)
        assert await progress() == await progress(id_task="other") == await progress(id_task="") == idle

        told = await task(id_task="mine")
        assert (told["active"], told["queued"], told["completed"], told["progress"]) == (True, False, False, 0.5)
        assert told["live_preview"].startswith("data:image/png;base64,") and told["id_live_preview"] > 0
        again = await task(id_task="mine", id_live_preview=told["id_live_preview"])
        assert (again["live_preview"], again["id_live_preview"]) == (None, told["id_live_preview"])
        assert (await task(id_task="mine", live_preview=False))["live_preview"] is None
        waiting = await task(id_task="b")
        assert (waiting["active"], waiting["queued"], waiting["progress"]) == (False, True, None)
        unknown = await task(id_task="other")
        assert (unknown["active"], unknown["queued"], unknown["completed"]) == (False, False, False)
        assert await task() == unknown

        for path in ("/sdapi/v1/interrupt", "/sdapi/v1/skip"):
            unnamed = await client.post(path)
            assert unnamed.status_code == 400 and "force_task_id" in unnamed.json()["detail"]
            assert (await client.post(path, params={"id_task": "other"})).status_code == 404
        assert fake.cancelled == []
        assert (await client.post("/sdapi/v1/interrupt", params={"id_task": "mine"})).json() == {}
        assert len((await mine).json()["images"]) == 1
        assert fake.cancelled == ["denoise 7"] and images.admission.in_flight == 1
        assert (await task(id_task="mine"))["completed"] is True
        assert (await client.post("/sdapi/v1/interrupt", params={"id_task": "mine"})).status_code == 200, "it is over"
        assert fake.gate is not None
        fake.gate.set()
        assert len((await theirs).json()["images"]) == 1
        assert (await task(id_task="b"))["completed"] is True


async def test_two_txt2img_of_one_name_are_not_under_way_at_once() -> None:
    fake = FakeStages(gate=asyncio.Event())
    async with a_client(service(fake)) as client, asyncio.timeout(20):
        body = BODIES[TXT2IMG] | {"force_task_id": "mine"}
        first = asyncio.create_task(client.post(TXT2IMG, json=body))
        await fake.entered.wait()
        second = await client.post(TXT2IMG, json=body)
        assert second.status_code == 400 and second.json()["detail"].startswith("force_task_id")
        assert (await client.post("/internal/progress", json={"id_task": "mine"})).json()["queued"] is True
        assert fake.gate is not None
        fake.gate.set()
        assert (await first).status_code == 200
        assert (await client.post(TXT2IMG, json=body)).status_code == 200, "the name is free again"


async def test_what_was_refused_is_not_completed() -> None:
    fake = FakeStages()
    images = service(fake, max_images_in_flight=1)
    async with a_client(images) as client, asyncio.timeout(20):

        async def completed(task_id: str) -> bool:
            told = await client.post("/internal/progress", json={"id_task": task_id})
            ended = await client.post("/sdapi/v1/interrupt", params={"id_task": task_id})
            assert (ended.status_code == 200) is told.json()["completed"]
            return bool(told.json()["completed"])

        async def asked(task_id: str, **fields: object) -> int:
            body = BODIES[TXT2IMG] | {"force_task_id": task_id} | fields
            return (await client.post(TXT2IMG, json=body)).status_code

        assert await asked("large", width=4096, height=4096) == 400 and not await completed("large")
        with images.admission.hold(1):
            assert await asked("full") == 503 and not await completed("full")
        fake.fail["denoise"] = RuntimeError("broken")
        assert await asked("broken") == 500 and not await completed("broken")
        fake.fail.clear()
        assert await asked("broken") == 200 and await completed("broken")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"id_task": 5}', 400),
        (b'{"id_live_preview": "x"}', 400),
        (b'{"id_task": "a", "live_preview": null}', 200),
    ],
)
async def test_a_question_about_a_task_is_read_strictly(body: bytes, status: int) -> None:
    async with a_client(service(FakeStages())) as client:
        response = await client.post("/internal/progress", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status
        unknown = await client.post("/internal/progress", json={"id_task": "a", "own": 1})
        assert json.loads(unknown.headers["x-sdxl-warnings"]) == ["own is unknown and was ignored"]


PRIORITIES = {
    "/v1/images/generations": {"prompt": "p", "priority": "@"},
    "/score": {"input_data": {"prompt": ["p"], "parameters": {"priority": "@"}}},
    "/hugging-face/text-to-image": {"inputs": "p", "parameters": {"priority": "@"}},
    TXT2IMG: {"prompt": "p", "priority": "@"},
    "/v1/generation/sdxl/text-to-image": {"text_prompts": [{"text": "p"}], "extras": {"priority": "@"}},
}


@pytest.mark.parametrize("path", [*PRIORITIES, "stream", "/imagine"])
@pytest.mark.parametrize(
    ("most", "priority", "status"), [(0, 0, 200), (0, -100, 200), (0, 1, 400), (5, 5, 200), (5, 6, 400)]
)
async def test_nobody_over_http_is_more_urgent_than_the_service_allows(
    path: str, most: int, priority: int, status: int
) -> None:
    fake = FakeStages()
    async with a_client(service(fake, max_priority=most)) as client:
        assert (await client.get("/v1/sdxl/info")).json()["max_priority"] == most
        if path == "/imagine":
            response = await client.get(path, params={"prompt": "p", "priority": priority})
        else:
            streams = path == "stream"
            body = PRIORITIES["/v1/images/generations" if streams else path]
            content = json.dumps(body | ({"stream": True} if streams else {})).replace('"@"', str(priority))
            response = await client.post(
                "/v1/images/generations" if streams else path,
                content=content.encode(),
                headers={"Content-Type": "application/json"},
            )
    assert response.status_code == status
    if status == 400:
        assert f"priority: {priority} is above {most}, this service's limits.max_priority" in response.text
        assert fake.calls == []
    else:
        assert {urgency.priority for urgency in fake.urgencies("encode")} == {priority}


async def test_what_webui_s_clients_read_is_there() -> None:
    async with a_client(service(FakeStages())) as client:
        for path, check in {
            "/sdapi/v1/sd-models": lambda body: body[0]["title"] == "sdxl",
            "/sdapi/v1/samplers": lambda body: {"Euler", "Euler a", "DPM++ 2M"} <= {item["name"] for item in body},
            "/sdapi/v1/schedulers": lambda body: "Karras" in {item["label"] for item in body},
            "/sdapi/v1/options": lambda body: body["sd_model_checkpoint"] == "sdxl",
            "/sdapi/v1/cmd-flags": lambda body: body["api"] is True,
            "/internal/ping": lambda body: body == {},
        }.items():
            response = await client.get(path)
            assert response.status_code == 200 and check(response.json()), path


# Hugging Face's, beside its picture


async def test_what_its_health_check_asks_is_there() -> None:
    assert (await get(FakeStages(), HUGGING_FACE + "/health")).json() == {"status": "ok"}


# Stability


async def test_one_picture_comes_as_it_is_with_its_seed_in_a_header() -> None:
    response = await post(FakeStages(), STABILITY, BODIES[STABILITY], Accept="image/png")
    assert response.headers["content-type"] == "image/png"
    assert (response.headers["finish-reason"], response.headers["seed"]) == ("SUCCESS", "5")
    assert response.content.startswith(b"\x89PNG")


async def test_an_engine_is_a_name_of_the_service() -> None:
    response = await post(FakeStages(), "/v1/generation/sdxl/text-to-image", BODIES[STABILITY])
    assert response.status_code == 200
    response = await post(FakeStages(), "/v1/generation/other/text-to-image", BODIES[STABILITY])
    assert response.status_code == 404 and message(STABILITY, response)
    engines = (await get(FakeStages(), "/v1/engines/list")).json()
    assert {"sdxl", "stable-diffusion-xl-1024-v1-0"} <= {engine["id"] for engine in engines}


# OpenAI and Azure, what they have beside pictures


async def test_one_model_is_described_and_an_unknown_one_is_404() -> None:
    assert (await get(FakeStages(), "/v1/models/sdxl")).json()["id"] == "sdxl"
    response = await get(FakeStages(), "/v1/models/gpt-image-1")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_name_with_a_slash_is_found() -> None:
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    images = ImageService(AppConfig(model_names=(name,)), FACTS, FakeStages().stages())
    async with a_client(images) as client:
        for spelt in (name, name.replace("/", "%2F")):
            assert (await client.get(f"/v1/models/{spelt}")).json()["id"] == name
            response = await client.post(f"/v1/generation/{spelt}/text-to-image", json=BODIES[STABILITY])
            assert response.status_code == 200, response.text


async def test_swagger_in_both_versions() -> None:
    assert (await get(FakeStages(), "/swagger.json")).json()["swagger"] == "2.0"
    assert (await get(FakeStages(), "/swagger.json?version=3")).json()["openapi"].startswith("3.0")
    response = await get(FakeStages(), "/swagger.json?version=4")
    assert (response.status_code, list(response.json())) == (400, ["message"])
