from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import BadRequestError
from huggingface_hub.utils import hf_raise_for_status
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.formats.hugging_face import wire as hugging_face
from serve_app.request.errors import InvalidRequest, NotAcceptable, Overloaded, ServiceError
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult, field_kinds
from tests.strategies import JSON

PNG = "image/png"


def decode(accept: str | None = PNG, **parameters: Any) -> hugging_face.Decoded:
    return hugging_face.decode(json.dumps({"inputs": "p", "parameters": parameters}).encode(), accept)


def refusal(body: bytes | None = None, accept: str | None = PNG, **parameters: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        if body is None:
            decode(accept, **parameters)
        else:
            hugging_face.decode(body, accept)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_prompt_is_enough() -> None:
    assert hugging_face.decode(b'{"inputs": "p"}', None) == hugging_face.Decoded(ImageRequest(prompt="p"), ())
    assert hugging_face.decode(b'{"inputs": "p", "parameters": null, "options": null}', PNG).warnings == ()


def test_the_clients_parameters_act() -> None:
    asked = decode(
        negative_prompt="n", height=64, width=128, num_inference_steps=7, guidance_scale=3, scheduler="heun", seed=5,
        num_images_per_prompt=1, n=1, prompt_2=None,
    )  # fmt: skip
    assert asked.warnings == ()
    assert asked.request == ImageRequest(
        prompt="p", negative_prompt="n", height=64, width=128, num_inference_steps=7, guidance_scale=3.0,
        scheduler="heun", seed=5,
    )  # fmt: skip


def test_every_field_of_a_request_is_a_parameter() -> None:
    assert set(hugging_face.PARAMETERS) == set(field_kinds()) - {"prompt"} | {"num_images_per_prompt"}


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("dpmpp_2m_karras", "dpmpp_2m_karras"),
    ],
)
def test_a_scheduler_may_have_diffusers_name(given: str, ours: str) -> None:
    assert decode(scheduler=given).request.scheduler == ours


@pytest.mark.parametrize(
    ("accept", "output_format"),
    [(None, "png"), ("*/*", "png"), ("image/*", "png"), ("image/webp", "webp"), ("image/png;q=0.1,image/jpeg", "jpeg")],
)
def test_accept_decides_the_format(accept: str | None, output_format: str) -> None:
    assert decode(accept).request == ImageRequest(prompt="p", output_format=output_format)  # type: ignore[arg-type]


def test_a_format_that_accept_leaves_open_may_be_named() -> None:
    assert decode("image/*", output_format="webp").request.output_format == "webp"
    assert refusal(accept=PNG, output_format="webp").message == (
        "output_format: webp is ruled out by Accept: 'image/png'"
    )


def test_an_accept_without_us_is_406() -> None:
    with pytest.raises(NotAcceptable):
        decode("application/json")


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        ({"options": {"use_cache": False}}, "options.use_cache has no effect"),
        ({"options": {"wait_for_model": True}}, "options.wait_for_model has no effect"),
        ({"options": {"x": 1}}, "options.x is unknown and was ignored"),
        ({"model": "m"}, "model is unknown and was ignored"),
        ({"parameters": {"target_fps": 1}}, "parameters.target_fps is unknown and was ignored"),
        ({"parameters": {"prompt": "q"}}, "parameters.prompt is unknown and was ignored"),
    ],
)
def test_what_has_no_effect_is_said(body: dict[str, Any], warning: str) -> None:
    asked = hugging_face.decode(json.dumps({"inputs": "p"} | body).encode(), PNG)
    assert asked == hugging_face.Decoded(ImageRequest(prompt="p"), (warning,))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("num_images_per_prompt", 2),
        ("num_images_per_prompt", True),
        ("n", 2),
        ("n", "1"),
        ("width", 65),
        ("seed", "5"),
        ("scheduler", "PNDMScheduler"),
        ("scheduler", ["euler"]),
        ("guidance_scale", "7"),
        ("output_format", "gif"),
    ],
)
def test_a_wrong_parameter_is_refused_and_named(name: str, wrong: Any) -> None:
    error = refusal(**{name: wrong})
    assert (error.param, error.status) == (name, 400)
    assert error.message.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON: Expecting value at line 1 column 1"),
        (b"[]", "the body must be a JSON object"),
        (b"{}", "inputs: field required"),
        (b'{"inputs": null}', "inputs: field required"),
        (b'{"inputs": ["p"]}', "inputs: input should be a valid string"),
        (b'{"inputs": " "}', "inputs: is empty"),
        (b'{"inputs": "p", "parameters": []}', "parameters: must be an object"),
        (b'{"inputs": "p", "options": 1}', "options: must be an object"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes, message: str) -> None:
    assert refusal(body).message == message


def test_the_answer_is_the_pictures_bytes_and_its_headers_are_ascii() -> None:
    result = ImageResult([GeneratedImage(b"file", 5, "webp", 64, 64)], warnings=["cut off: „née“\n", "twice", "twice"])
    answer = hugging_face.encode(result, ("asked",))
    assert (answer.data, answer.media_type) == (b"file", "image/webp")
    names, values = zip(*answer.headers, strict=True)
    assert names == ("X-SDXL-Seed", "X-HF-Warning", "X-HF-Warning", "X-HF-Warning")
    assert values[0] == "5"
    assert [value.split("; ", 1)[1] for value in values[1:]] == ["asked", r"cut off: \u201en\xe9e\u201c\n", "twice"]
    assert len({value.split(";")[0] for value in values[1:]}) == 3  # the client shows a topic once


@pytest.mark.parametrize("line", ["\U0001f98a" * 100, "n" * 300, "\u00e9" * 40], ids=["emoji", "letters", "short"])
def test_warnings_have_room_in_a_proxys_buffer(line: str) -> None:
    given = [f"{number} {line}" for number in range(21)]
    result = ImageResult([GeneratedImage(b"file", 5, "png", 64, 64)], warnings=given[11:])
    headers = hugging_face.encode(result, tuple(given[:11])).headers
    said = [value.split("; ", 1)[1] for key, value in headers if key == "X-HF-Warning"]
    assert sum(len(f"{key}: {value}\r\n") for key, value in headers) < 1_200
    assert said[-1] == f"... and {21 - (len(said) - 1)} more" and len(said) > 2
    assert all(value.isascii() and value.isprintable() for value in said)


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequest("prompt: is empty", param="prompt"), 400), (Overloaded("full"), 503)]
)
def test_the_client_shows_the_message_once(error: ServiceError, status: int) -> None:
    body = hugging_face.encode_error(error)
    response = httpx2.Response(status, json=body, request=httpx2.Request("POST", "http://here/hugging-face"))
    with pytest.raises(Exception) as caught:
        hf_raise_for_status(response)
    assert str(caught.value).count(body["error"]) == 1
    assert isinstance(caught.value, BadRequestError) == (status == 400)


def test_an_error_of_the_service_is_in_this_formats_words() -> None:
    assert hugging_face.encode_error(InvalidRequest("prompt: is empty", param="prompt")) == {
        "error": "inputs: is empty"
    }


def test_the_schemas_example_is_accepted() -> None:
    schema = hugging_face.text_to_image_schema()
    assert hugging_face.decode(json.dumps(schema["example"]).encode(), PNG).warnings == ()
    assert set(schema["properties"]["parameters"]["properties"]) == set(hugging_face.PARAMETERS)


@settings(max_examples=200, deadline=None)
@given(
    JSON | st.dictionaries(st.sampled_from(["inputs", "parameters", "options", "x"]), JSON),
    st.dictionaries(st.sampled_from([*hugging_face.PARAMETERS, "x"]), JSON, max_size=4),
    st.text(max_size=20) | st.just(PNG),
)
def test_no_body_raises_anything_but_an_error_with_one_line(body: Any, parameters: dict[str, Any], accept: str) -> None:
    for given_body in (body, {"inputs": "p", "parameters": parameters}):
        try:
            hugging_face.decode(json.dumps(given_body).encode(), accept)
        except ServiceError as error:
            assert "\n" not in error.message
            json.dumps(hugging_face.encode_error(error), ensure_ascii=False).encode()
