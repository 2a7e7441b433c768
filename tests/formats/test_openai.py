from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from openai.types import ImagesResponse
from openai.types.image_gen_completed_event import Usage as CompletedUsage
from openai.types.images_response import Usage as ImagesUsage

from serve_app.formats.openai import wire as openai
from serve_app.request.errors import InvalidRequest, ModelNotFound, Overloaded, ServiceError
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult

NAMES = ("sdxl", "other")


def decode(**fields: Any) -> openai.Decoded:
    return openai.decode(json.dumps({"prompt": "p"} | fields).encode(), NAMES)


def refusal(body: bytes | None = None, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        if body is None:
            decode(**fields)
        else:
            openai.decode(body, NAMES)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_prompt_is_enough() -> None:
    assert decode() == openai.Decoded(ImageRequest(prompt="p"), "b64_json", ())


def test_sdxls_own_fields_ride_beside_openais() -> None:
    asked = decode(model="other", n=2, size="64x128", seed=5, num_inference_steps=7, original_size=[1, 2], user=None)
    assert asked.request == ImageRequest(
        prompt="p", n=2, width=64, height=128, seed=5, num_inference_steps=7, original_size=(1, 2)
    )
    assert asked.warnings == ()


def test_null_means_absent() -> None:
    fields = dict.fromkeys((*ImageRequest.model_fields, *openai.OpenAIFields.model_fields))
    assert decode(**fields | {"prompt": "p"}) == decode()


@pytest.mark.parametrize("size", ["auto", None])
def test_no_size_is_the_checkpoints_own(size: str | None) -> None:
    assert decode(size=size).request == ImageRequest(prompt="p")


@pytest.mark.parametrize(
    "size", ["", "64", "64x", "x64", "64x64x64", "64*64", "-64x64", "64.0x64", "AUTO", " 64x64", "1234567x8", "64x64\n"]
)
def test_a_size_of_another_form_is_refused(size: str) -> None:
    error = refusal(size=size)
    assert (error.param, error.status) == ("size", 400)


@pytest.mark.parametrize("size", ["65x64", "0x64"])
def test_a_size_that_no_picture_has_is_refused(size: str) -> None:
    assert refusal(size=size).param == "width"


def test_size_may_agree_with_width_and_height_and_not_contradict_them() -> None:
    assert decode(size="64x128", width=64).request.height == 128
    assert refusal(size="64x128", height=64).param == "size"
    assert decode(size="auto", width=64).request.width == 64


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"quality": "hd"}, "quality has no effect on SDXL"),
        ({"style": "vivid"}, "style has no effect on SDXL"),
        ({"moderation": "low"}, "moderation has no effect on SDXL"),
        ({"user": "me"}, "user has no effect on SDXL"),
        ({"quality": "max"}, "quality has no effect on SDXL"),
        ({"safety_identifier": "me"}, "safety_identifier has no effect on SDXL"),
        ({"complexity": "high"}, "complexity has no effect on SDXL"),
        ({"svg": {"width": 5}}, "svg has no effect on SDXL"),
        ({"frame_count": 2}, "frame_count has no effect on SDXL"),
        ({"frame_duration_ms": 40}, "frame_duration_ms has no effect on SDXL"),
        ({"partial_images": 2}, "partial_images has no effect without stream"),
        ({"progress": True, "stream": False}, "progress has no effect without stream"),
        (
            {"stream": True, "response_format": "url"},
            "response_format url has no effect on a stream: its events hold base64",
        ),
        (
            {"background": "transparent"},
            "background transparent has no effect: SDXL draws opaque pictures",
        ),
        ({"num_steps": 5}, "num_steps is unknown and was ignored"),
        ({"x" * 200: 5}, f"{'x' * 100}... is unknown and was ignored"),
        ({"\ud800": 5}, "? is unknown and was ignored"),
    ],
)
def test_what_has_no_effect_is_said(fields: dict[str, Any], warning: str) -> None:
    assert decode(**fields).warnings == (warning,)
    assert decode(**fields).request == ImageRequest(prompt="p")


@pytest.mark.parametrize(
    "fields",
    [{"quality": "auto"}, {"moderation": "auto"}, {"background": "opaque"}, {"background": "auto"}, {"stream": False}],
)
def test_what_asks_for_what_is_done_anyway_warns_of_nothing(fields: dict[str, Any]) -> None:
    assert decode(**fields).warnings == ()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("model", 5),
        ("size", 64),
        ("response_format", "png"),
        ("quality", "best"),
        ("style", "bold"),
        ("background", "red"),
        ("moderation", "none"),
        ("stream", "yes"),
        ("progress", "yes"),
        ("partial_images", 4),
        ("partial_images", -1),
        ("partial_images", True),
        ("user", 5),
        ("n", "1"),
        ("n", 0),
        ("n", 11),
        ("output_format", "gif"),
        ("output_compression", 101),
        ("scheduler", "best"),
        ("prompt", ["p"]),
        ("prompt", ""),
        ("prompt", None),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(name: str, wrong: Any) -> None:
    error = refusal(**{name: wrong})
    assert error.param == name
    assert error.message.startswith(f"{name}: ")


def test_an_unknown_model_is_404_and_the_known_ones_are_said() -> None:
    error = refusal(model="sd15")
    assert isinstance(error, ModelNotFound)
    assert (error.status, error.code) == (404, "model_not_found")
    assert error.message == "model: 'sd15' does not exist; this service has sdxl, other"
    assert len(refusal(model="x" * 1_000_000).message) < 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not valid JSON: Expecting value at line 1 column 1"),
        (b"{", "the body is not valid JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        (b'{"prompt": NaN}', "the body is not valid JSON: NaN is not a JSON value"),
        (b'{"prompt": -Infinity}', "the body is not valid JSON: -Infinity is not a JSON value"),
        (b'{"prompt": "\xff"}', "the body is not valid JSON: not UTF-8 at byte 12"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "the body is not valid JSON: a number has too many digits"),
        (b'{"a": ' + b"[" * 10_000, "the body is not valid JSON: nested too deeply"),
        (b'["prompt"]', "the body must be a JSON object"),
        (b'"prompt"', "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
        (b"{}", "prompt: field required"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes, message: str) -> None:
    assert refusal(body).message == message


RESULT = ImageResult(
    images=[GeneratedImage(b"one", 5, "jpeg", 64, 72), GeneratedImage(b"two", 6, "jpeg", 64, 72)],
    warnings=["cut"],
    created=1_700_000_000,
    text_tokens=9,
)


def test_the_response_is_openais() -> None:
    body = openai.encode(RESULT, "b64_json", ("asked",))
    assert body == {
        "created": 1_700_000_000,
        "background": "opaque",
        "output_format": "jpeg",
        "size": "64x72",
        "data": [
            {"b64_json": "b25l", "url": None, "revised_prompt": None, "seed": 5},
            {"b64_json": "dHdv", "url": None, "revised_prompt": None, "seed": 6},
        ],
        "usage": openai.encode_usage(9),
        "warnings": ["asked", "cut"],
    }
    parsed = ImagesResponse.model_validate_json(json.dumps(body))
    assert parsed.data is not None and base64.b64decode(parsed.data[1].b64_json or "") == b"two"


def test_a_url_is_a_data_address() -> None:
    first = openai.encode(RESULT, "url")["data"][0]
    assert (first["url"], first["b64_json"]) == ("data:image/jpeg;base64,b25l", None)


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (
            InvalidRequest("n: no", param="n"),
            {"message": "n: no", "type": "invalid_request_error", "param": "n", "code": None},
        ),
        (
            Overloaded("full", retry_after_s=3),
            {"message": "full", "type": "overloaded_error", "param": None, "code": "overloaded"},
        ),
        (ServiceError("no"), {"message": "no", "type": "server_error", "param": None, "code": None}),
    ],
)
def test_an_error_has_openais_four_keys(error: ServiceError, body: dict[str, Any]) -> None:
    assert openai.encode_error(error) == {"error": body}


def test_the_models_are_listed() -> None:
    assert openai.encode_models(("a", "b"), 5) == {
        "object": "list",
        "data": [
            {"id": "a", "object": "model", "created": 5, "owned_by": "sdxl-serve"},
            {"id": "b", "object": "model", "created": 5, "owned_by": "sdxl-serve"},
        ],
    }


def test_the_schema_has_every_field_that_is_read_and_its_example_is_accepted() -> None:
    schema = openai.generations_schema()
    assert set(schema["properties"]) == {*ImageRequest.model_fields, *openai.OpenAIFields.model_fields}
    assert decode(**schema["example"]).warnings == ()


def test_a_name_that_stands_twice_is_refused() -> None:
    error = refusal(b'{"prompt": "p", "seed": 1, "seed": 2}')
    assert error.message == "the body is not valid JSON: 'seed' stands twice in one object"


def test_one_model_is_described() -> None:
    listed = openai.encode_models(NAMES, 5)["data"]
    assert [openai.encode_model(name, NAMES, 5) for name in NAMES] == listed
    with pytest.raises(ModelNotFound) as caught:
        openai.encode_model("sd15", NAMES, 5)
    assert caught.value.param == "model"


def test_usage_has_what_the_sdk_requires() -> None:
    usage = openai.encode_usage(12)
    for model in (ImagesUsage, CompletedUsage):
        parsed = model.model_validate(usage, strict=True)
        assert (parsed.input_tokens, parsed.output_tokens, parsed.total_tokens) == (12, 0, 12)
