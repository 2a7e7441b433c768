"""The HTTP routes over stages without models: every bad input is refused in its protocol's envelope, unqueued."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_app.http.app import build_http_app
from serve_app.pictures.files import read_parameters
from serve_app.request.errors import InternalError, Overloaded, PictureFailed, StageUnavailable
from serve_app.request.schema import ImageResult, StageTiming
from serve_app.runtime.service import ImageService
from tests.fakes import FakeStages, service

MIB = 2**20
GENERATIONS, SCORE, IMAGINE = "/v1/images/generations", "/score", "/imagine"
JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def a_client(images: ImageService) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_http_app(images))
    async with (
        asyncio.timeout(60),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client,
    ):
        yield client


async def post(fake: FakeStages, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with a_client(service(fake)) as client:
        return await client.post(path, content=content, headers=JSON | headers)


async def get(fake: FakeStages, path: str, **headers: str) -> httpx.Response:
    async with a_client(service(fake)) as client:
        return await client.get(path, headers=headers)


def openai_error(response: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's envelope, whole and one line."""
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and "\n" not in body["error"]["message"]
    return dict(body["error"])


def score_error(response: httpx.Response) -> str:
    body = response.json()
    assert list(body) == ["message"]
    assert isinstance(body["message"], str) and "\n" not in body["message"]
    return body["message"]


async def asked_by_every_route(field: str, query: str = "") -> list[tuple[str, httpx.Response, FakeStages]]:
    """Asks each route for a picture with one more field, written as JSON and as a query."""
    prompt = "" if field.startswith('"prompt"') else '"prompt": "p", '
    answers = []
    fake = FakeStages()
    answers.append((GENERATIONS, await post(fake, GENERATIONS, f"{{{prompt}{field}}}".encode()), fake))
    fake = FakeStages()
    if field.startswith('"prompt"'):
        body = f'{{"input_data": [{{{field}}}]}}'
    else:
        body = f'{{"input_data": {{"columns": ["prompt"], "data": ["p"], "parameters": {{{field}}}}}}}'
    answers.append((SCORE, await post(fake, SCORE, body.encode()), fake))
    if query:
        fake = FakeStages()
        path = f"{IMAGINE}?{query}" if query.startswith("prompt") else f"{IMAGINE}?prompt=p&{query}"
        answers.append((IMAGINE, await get(fake, path), fake))
    return answers


HUGE = "9" * 4_000

BAD_FIELDS = [
    # sizes
    ('"width": 65', "width=65", "width"),
    ('"width": 0', "width=0", "width"),
    ('"width": -64', "width=-64", "width"),
    ('"height": 56', "height=56", "height"),
    ('"height": 2056', "height=2056", "height"),
    ('"width": 2048, "height": 2048', "width=2048&height=2048", "width"),
    (f'"width": {HUGE}2', f"width={HUGE}2", "width"),
    ('"original_size": [0, 64]', "original_size=0&original_size=64", "original_size"),
    ('"target_size": [64]', "target_size=64", "target_size"),
    # steps
    ('"num_inference_steps": 0', "num_inference_steps=0", "num_inference_steps"),
    ('"num_inference_steps": 201', "num_inference_steps=201", "num_inference_steps"),
    (f'"num_inference_steps": {HUGE}', f"num_inference_steps={HUGE}", "num_inference_steps"),
    # numbers that are none
    ('"guidance_scale": 1e999', "guidance_scale=1e999", "guidance_scale"),
    ('"guidance_scale": -1e999', "guidance_scale=-inf", "guidance_scale"),
    ('"eta": 1e999', "eta=nan", "eta"),
    (f'"guidance_scale": {HUGE}', f"guidance_scale={HUGE}", "guidance_scale"),
    ('"width": 1e999', "width=1e999", "width"),
    # wrong types
    ('"num_inference_steps": "5"', "num_inference_steps=five", "num_inference_steps"),
    ('"num_inference_steps": 5.5', "num_inference_steps=5.5", "num_inference_steps"),
    ('"num_inference_steps": true', "num_inference_steps=true", "num_inference_steps"),
    ('"guidance_scale": [7]', "guidance_scale=7&guidance_scale=7", "guidance_scale"),
    ('"seed": 1.5', "seed=1.5", "seed"),
    ('"seed": -1', "seed=-1", "seed"),
    (f'"seed": {2**63}', f"seed={2**63}", "seed"),
    ('"negative_prompt": {}', "", "negative_prompt"),
    # n
    ('"n": 0', "n=0", "n"),
    ('"n": 11', "n=11", "n"),
    ('"n": -1', "n=-1", "n"),
    # names
    ('"scheduler": "best"', "scheduler=best", "scheduler"),
    ('"scheduler": ""', "scheduler=", "scheduler"),
    ('"output_format": "gif"', "output_format=gif", "output_format"),
    # what this checkpoint cannot do
    ('"clip_skip": 3', "clip_skip=3", "clip_skip"),
    (f'"clip_skip": {HUGE}', f"clip_skip={HUGE}", "clip_skip"),
    ('"high_noise_frac": 0', "high_noise_frac=0", "high_noise_frac"),
    # texts
    ('"prompt": ""', "prompt=", "prompt"),
    ('"prompt": "  \\n"', "prompt=%20%0A", "prompt"),
    (f'"prompt": "{"x" * 4_001}"', f"prompt={'x' * 4_001}", "prompt"),
    (f'"prompt": "{"x" * 200_000}"', "", "prompt"),
    ('"prompt": 5', "", "prompt"),
    ('"prompt": ["p"]', "", "prompt"),
    ('"prompt": "\\ud800"', "", "prompt"),
    ('"negative_prompt": "\\udfff x"', "", "negative_prompt"),
    ('"prompt": "a\\u0000b"', "prompt=a%00b", "prompt"),
    ('"prompt_2": "\\u0000"', "", "prompt_2"),
    ('"negative_prompt": "\\u0000"', "negative_prompt=%00", "negative_prompt"),
    ('"negative_prompt_2": "b\\u0000"', "negative_prompt_2=b%00", "negative_prompt_2"),
]


@pytest.mark.parametrize(("field", "query", "param"), BAD_FIELDS, ids=[field[:40] for field, _, _ in BAD_FIELDS])
async def test_a_bad_value_is_refused_by_every_route_and_nothing_is_queued(field: str, query: str, param: str) -> None:
    for path, response, fake in await asked_by_every_route(field, query):
        assert response.status_code == 400, path
        if path == SCORE:
            assert score_error(response).startswith(param)
        else:
            error = openai_error(response)
            assert (error["type"], error["param"]) == ("invalid_request_error", param)
            assert error["message"].startswith(param)
        assert fake.calls == [], path
        assert response.headers["x-request-id"]


NO_REQUESTS = [
    (b"", 400),
    (b"{", 400),
    (b"prompt=p", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"{}", 400),
    (b'{"prompt": "p", "input_data": {"prompt": ["p"]}, "seed": NaN}', 400),
    (b'{"prompt": "p", "input_data": {"prompt": ["p"]}, "seed": Infinity}', 400),
    (b'{"prompt": "p", "input_data": {"prompt": ["p"]}, "seed": -Infinity}', 400),
    (b'{"prompt": "\xff\xfe", "input_data": {"prompt": ["\xff\xfe"]}}', 400),
    ('{"prompt": "p"}'.encode("utf-16"), 400),
    (b'{"prompt": "\xed\xa0\x80", "input_data": {"prompt": ["\xed\xa0\x80"]}}', 400),
    (b'{"prompt": "p", "input_data": {"prompt": ["p"]}, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    (b'{"x": ' * 30_000 + b"1" + b"}" * 30_000, 400),
    (b'{"prompt": "p", "input_data": {"prompt": ["p"]}, "seed": ' + b"9" * 5_000 + b"}", 400),
    (b'{"prompt": "p", "input_data": {"prompt": ["p"]}}' + b" " * 4 * MIB, 413),
]


@pytest.mark.parametrize(("body", "status"), NO_REQUESTS, ids=[repr(body[:60]) for body, _ in NO_REQUESTS])
@pytest.mark.parametrize("path", [GENERATIONS, SCORE])
async def test_a_body_that_is_no_request_is_refused_and_nothing_is_queued(path: str, body: bytes, status: int) -> None:
    fake = FakeStages()
    response = await post(fake, path, body)
    assert response.status_code == status
    message = score_error(response) if path == SCORE else openai_error(response)["message"]
    assert message and len(message) < 200
    assert fake.calls == []


@pytest.mark.parametrize("path", [GENERATIONS, SCORE])
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_of_50_mb_is_refused_before_it_is_read(path: str, announced: bool) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(50):
            sent += MIB
            yield b" " * MIB

    fake = FakeStages()
    headers = JSON | ({"Content-Length": str(50 * MIB)} if announced else {})
    async with a_client(service(fake)) as client:
        response = await client.post(path, content=body(), headers=headers)
    assert response.status_code == 413
    message = score_error(response) if path == SCORE else openai_error(response)["message"]
    limit = 4 * MIB if path == SCORE else MIB // 4
    assert message == f"the body is larger than {limit} bytes"
    assert sent <= (0 if announced else limit + MIB)
    assert fake.calls == []


async def test_an_unknown_model_is_404() -> None:
    fake = FakeStages()
    response = await post(fake, GENERATIONS, {"prompt": "p", "model": "sd15"})
    error = openai_error(response)
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert fake.calls == []


async def test_more_rows_than_the_service_takes_are_refused() -> None:
    fake = FakeStages()
    response = await post(fake, SCORE, {"input_data": {"prompt": ["p"] * 129}})
    assert (response.status_code, score_error(response)[:20]) == (400, "input_data: 129 rows")
    response = await post(fake, SCORE, {"input_data": {"prompt": ["p"] * 20}, "parameters": {"n": 10}})
    assert response.status_code == 400
    assert fake.calls == []


async def test_score_wants_json_and_one_bad_row_refuses_all() -> None:
    fake = FakeStages()
    async with a_client(service(fake)) as client:
        response = await client.post(SCORE, content=b'{"input_data": {"prompt": ["p"]}}')
    assert (response.status_code, score_error(response)) == (415, "Expects Content-Type to be application/json")
    response = await post(fake, SCORE, {"input_data": {"prompt": ["p", ""]}})
    assert (response.status_code, score_error(response)) == (400, "prompt: is empty")
    assert fake.calls == []


@pytest.mark.parametrize(
    "query", ["", "img_size=64", "prompt=p&prompt=q", "prompt=p&img_size=big", "prompt=p&img_size=64&width=64"]
)
async def test_an_address_that_is_no_request_is_refused(query: str) -> None:
    fake = FakeStages()
    response = await get(fake, f"{IMAGINE}?{query}")
    assert response.status_code == 400
    assert openai_error(response)["type"] == "invalid_request_error"
    assert fake.calls == []


def timing_stages(response: httpx.Response) -> list[str]:
    parts = response.headers["server-timing"].split(", ")
    found = [re.fullmatch(r"(\w+);dur=\d+\.\d", part) for part in parts]
    return [match[1] if match else "?" for match in found]


STAGES = ["encode", "denoise", "refine", "decode"]


async def test_generations_answers_with_pictures() -> None:
    body = {"prompt": "p", "n": 2, "seed": 5, "size": "64x72", "output_format": "webp", "model": "sdxl", "hd": 1}
    response = await post(FakeStages(warnings=("cut",)), GENERATIONS, body)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["size"], answer["output_format"]) == ("64x72", "webp")
    assert [item["seed"] for item in answer["data"]] == [5, 6]
    kept = read_parameters(base64.b64decode(answer["data"][1]["b64_json"]))
    assert kept is not None and (kept["seed"], kept["width"], kept["height"]) == (6, 64, 72)
    assert answer["warnings"] == ["hd is unknown and was ignored", "cut"]
    assert json.loads(response.headers["x-sdxl-warnings"]) == answer["warnings"]
    assert timing_stages(response) == [*STAGES, "queue"]


async def test_a_field_whose_name_is_no_text_is_warned_of() -> None:
    response = await post(FakeStages(), GENERATIONS, b'{"prompt": "p", "\\ud800": 1}')
    assert response.status_code == 200
    assert response.json()["warnings"] == ["? is unknown and was ignored"]


async def test_score_answers_with_a_row_an_image() -> None:
    body = {
        "input_data": {"columns": ["prompt"], "data": ["p", "q"], "index": [1, 0]},
        "parameters": {"seed": 5, "strength": 1},
    }
    response = await post(FakeStages(), SCORE, body, **{"x-ms-client-request-id": "theirs"})
    assert response.status_code == 200
    rows = response.json()
    assert [row["prompt"] for row in rows] == ["p", "q"]
    for row in rows:
        assert set(row) == {"prompt", "generated_image", "nsfw_content_detected"}
        assert base64.b64decode(row["generated_image"]).startswith(b"\x89PNG")
    assert json.loads(response.headers["x-sdxl-warnings"]) == ["strength is unknown and was ignored"]
    assert timing_stages(response) == [*STAGES, "queue"]
    assert response.headers["x-ms-request-id"] == response.headers["x-request-id"]
    assert response.headers["x-ms-client-request-id"] == "theirs"


async def test_score_of_no_rows_is_an_empty_list() -> None:
    fake = FakeStages()
    response = await post(fake, SCORE, {"input_data": {"columns": ["prompt"], "data": []}})
    assert (response.status_code, response.json(), fake.calls) == (200, [], [])


async def test_an_error_of_score_has_its_headers_too() -> None:
    response = await post(FakeStages(), SCORE, b"", **{"x-ms-client-request-id": "theirs"})
    assert response.headers["x-ms-request-id"] == response.headers["x-request-id"]
    assert response.headers["x-ms-client-request-id"] == "theirs"


async def test_imagine_answers_with_a_picture() -> None:
    response = await get(FakeStages(), f"{IMAGINE}?prompt=a%20cat&img_size=128&output_format=jpeg&seed=5&cat=1")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")
    kept = read_parameters(response.content)
    assert kept is not None and (kept["prompt"], kept["width"], kept["seed"]) == ("a cat", 128, 5)
    assert response.headers["x-sdxl-seed"] == "5"
    assert json.loads(response.headers["x-sdxl-warnings"]) == ["cat is unknown and was ignored"]
    assert timing_stages(response) == [*STAGES, "queue"]


async def test_a_request_without_warnings_has_no_warnings_header() -> None:
    assert "x-sdxl-warnings" not in (await get(FakeStages(), f"{IMAGINE}?prompt=p")).headers


async def test_rows_that_ran_side_by_side_are_timed_by_the_slowest_of_each_stage() -> None:
    class Timed(ImageService):
        async def generate_all(self, *arguments: Any, **options: Any) -> list[ImageResult]:
            results = await super().generate_all(*arguments, **options)
            seconds = [(1.0, 4.0, 0.0, 2.0), (3.0, 2.0, 0.5, 1.0)]
            return [
                replace(
                    result,
                    timings=[
                        StageTiming(t.stage, s, queue_seconds=0.25 if t.stage == "denoise" and s > 3 else 0.0)
                        for t, s in zip(result.timings, row, strict=True)
                    ],
                )
                for result, row in zip(results, seconds, strict=True)
            ]

    plain = service(FakeStages())
    async with a_client(Timed(plain.config, plain.facts, FakeStages().stages())) as client:
        response = await client.post(SCORE, json={"input_data": {"prompt": ["p", "q"]}})
    timing = response.headers["server-timing"]
    assert timing == "encode;dur=3000.0, denoise;dur=4000.0, refine;dur=500.0, decode;dur=2000.0, queue;dur=3250.0"


async def test_the_base_alone_is_timed_in_four_stages_too() -> None:
    response = await get(FakeStages(), f"{IMAGINE}?prompt=p&high_noise_frac=1")
    assert timing_stages(response) == [*STAGES, "queue"]
    assert "refine;dur=0.0" in response.headers["server-timing"]


@pytest.mark.parametrize(
    "warnings",
    [
        ("x" * 32_000,),
        ("\U0001f600\n\r" * 11_000,) * 4,
        tuple(f"{number} {'x' * 500}" for number in range(1_000)),
        tuple(f"warning {number}" for number in range(100_000)),
        ("\x7f\x00" * 1_000, "plain"),
        ("x" * 249, "y" * 248, "z" * 247, "\u00e9" * 300, "last"),
    ],
)
async def test_the_warnings_header_is_json_and_stays_small(warnings: tuple[str, ...]) -> None:
    response = await post(FakeStages(warnings=warnings), GENERATIONS, {"prompt": "p"})
    header = response.headers["x-sdxl-warnings"]
    assert len(header) <= 1_024 and header.isascii() and header.isprintable()
    lines = json.loads(header)
    assert lines[0][:15] == warnings[0][:15]
    assert response.json()["warnings"] == list(warnings), "the body has room for all"
    distinct = len(set(warnings))
    if len(lines) < distinct:
        assert lines[-1] == f"... and {distinct - len(lines) + 1} more"


@pytest.mark.parametrize("path", [GENERATIONS, SCORE, f"{IMAGINE}?prompt=p"])
@pytest.mark.parametrize("given", ["mine-1", "a b", "x" * 256, 'Root=1-67891233;"{}"', None])
async def test_a_request_id_is_the_callers_or_a_new_one(path: str, given: str | None) -> None:
    fake = FakeStages()
    headers = {} if given is None else {"x-request-id": given}
    if path.startswith(IMAGINE):
        response = await get(fake, path, **headers)
    else:
        response = await post(fake, path, {"prompt": "p", "input_data": {"prompt": ["p"]}}, **headers)
    assert response.status_code == 200
    used = fake.tasks[0].id.removesuffix("-0")
    if given is None:
        assert response.headers["x-request-id"] == used
    else:
        assert used == given
        assert "x-request-id" not in response.headers, "Ray's proxy puts it there itself"


@pytest.mark.parametrize("path", [GENERATIONS, SCORE, f"{IMAGINE}?prompt=p"])
@pytest.mark.parametrize("given", [["x" * 257], [""], ["\u00e9"], ["a\tb"], ["one", "two"]])
async def test_a_request_id_that_no_log_could_show_is_refused(path: str, given: list[str]) -> None:
    """Ray's proxy puts it on the answer as it came: another one in the log would be a second id of one request."""
    fake = FakeStages()
    headers = [("Content-Type", "application/json"), *(("x-request-id", one.encode("latin-1")) for one in given)]
    async with a_client(service(fake)) as client:
        method = "GET" if path.startswith(IMAGINE) else "POST"
        response = await client.request(method, path, content=b'{"prompt": "p"}', headers=headers)
    assert response.status_code == 400 and "X-Request-Id" in message_of(path, response)
    assert fake.calls == []


def ask(client: httpx.AsyncClient, path: str) -> Any:
    if path == IMAGINE:
        return client.get(f"{IMAGINE}?prompt=p")
    return client.post(path, json={"prompt": "p", "input_data": {"prompt": ["p"]}})


def message_of(path: str, response: httpx.Response) -> str:
    return score_error(response) if path == SCORE else str(openai_error(response)["message"])


@pytest.mark.parametrize("path", [GENERATIONS, SCORE, IMAGINE])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_fault_of_ours_is_500_and_leaks_nothing(
    path: str, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeStages(fail={stage: RuntimeError("secret at /srv/models/base")})
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        async with a_client(service(fake)) as client:
            response = await ask(client, path)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    message = message_of(path, response)
    assert message == f"internal error; the log has it under request {response.headers['x-request-id']}"
    assert "secret" not in response.text and "Traceback" not in response.text
    assert "secret" in caplog.text and response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("path", [GENERATIONS, SCORE, IMAGINE])
@pytest.mark.parametrize(
    ("error", "status", "retry_after", "should_retry"),
    [
        (StageUnavailable("the stage is being replaced", retry_after_s=4.2), 503, "5", None),
        (Overloaded("the stage is full", retry_after_s=1), 503, "1", None),
        (PictureFailed("no finite picture"), 500, None, "false"),
        (InternalError("no"), 500, None, "false"),
    ],
)
async def test_an_error_of_a_stage_says_whether_to_come_back(
    path: str, error: Exception, status: int, retry_after: str | None, should_retry: str | None
) -> None:
    async with a_client(service(FakeStages(fail={"denoise": error}))) as client:
        response = await ask(client, path)
    assert response.status_code == status
    assert message_of(path, response) == str(error)
    assert response.headers.get("retry-after") == retry_after
    assert response.headers.get("x-should-retry") == should_retry


@pytest.mark.parametrize("path", [GENERATIONS, SCORE, IMAGINE])
async def test_a_full_service_says_when_to_come_back_and_takes_in_again_when_it_has_room(path: str) -> None:
    gate = asyncio.Event()
    fake = FakeStages(gate=gate)
    async with a_client(service(fake, max_images_in_flight=1)) as client:
        first = asyncio.create_task(ask(client, IMAGINE))
        await fake.entered.wait()
        refused = await ask(client, path)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert "x-should-retry" not in refused.headers
        assert "full" in message_of(path, refused)
        assert fake.calls.count("encode") == 1
        assert (await client.get("/health")).json()["images_in_flight"] == 1
        gate.set()
        assert (await first).status_code == 200
        assert (await ask(client, path)).status_code == 200
        assert (await client.get("/health")).json() == {"status": "ok", "model": "sdxl", "images_in_flight": 0}


async def test_the_models_are_the_names_the_service_answers_to() -> None:
    async with a_client(service(FakeStages())) as client:
        names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert names[0] == "sdxl"
        for name in names:
            assert (await client.post(GENERATIONS, json={"prompt": "p", "model": name})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/images", 404),
        ("POST", "/v1/images/edits", 404),
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/page/nothing.js", 404),
        ("GET", GENERATIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", IMAGINE, 405),
        ("GET", SCORE, 405),
    ],
)
async def test_a_wrong_address_or_method_has_an_envelope(method: str, path: str, status: int) -> None:
    async with a_client(service(FakeStages())) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert path in message_of(path, response)
    assert ("allow" in response.headers) is (status == 405)


async def test_the_openapi_document_lists_every_route_and_field() -> None:
    async with a_client(service(FakeStages())) as client:
        document = (await client.get("/openapi.json")).json()
        assert (await client.get("/docs")).status_code == 200
    methods = {path: set(operations) for path, operations in document["paths"].items()}
    assert methods == {
        GENERATIONS: {"post"},
        SCORE: {"post"},
        IMAGINE: {"get"},
        "/v1/models": {"get"},
        "/v1/models/{name}": {"get"},
        "/swagger.json": {"get"},
        "/hugging-face/text-to-image": {"post"},
        "/hugging-face/text-to-image/health": {"get"},
        "/sdapi/v1/txt2img": {"post"},
        "/sdapi/v1/progress": {"get"},
        "/sdapi/v1/interrupt": {"post"},
        "/sdapi/v1/skip": {"post"},
        "/sdapi/v1/sd-models": {"get"},
        "/sdapi/v1/samplers": {"get"},
        "/sdapi/v1/schedulers": {"get"},
        "/sdapi/v1/options": {"get"},
        "/sdapi/v1/cmd-flags": {"get"},
        "/internal/ping": {"get"},
        "/internal/progress": {"post"},
        "/v1/generation/{engine}/text-to-image": {"post"},
        "/v1/engines/list": {"get"},
        "/v1/sdxl/info": {"get"},
        "/": {"get"},
        "/health": {"get"},
        "/ready": {"get"},
    }
    body = document["paths"][GENERATIONS]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "size", "num_inference_steps", "high_noise_frac"} <= set(body["properties"])
    query = {parameter["name"]: parameter for parameter in document["paths"][IMAGINE]["get"]["parameters"]}
    assert query["prompt"]["required"] and not query["img_size"].get("required", False)
    assert {"guidance_scale", "img_size", "seed"} <= set(query)
    assert "$ref" not in json.dumps([body, list(query.values())]), "nothing points outside the route"
