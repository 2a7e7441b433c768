from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.formats.stability import wire as stability
from serve_app.request.errors import InvalidRequest, ModelNotFound, NotAcceptable, Overloaded, ServiceError
from serve_app.request.schedulers import BY_STABILITY
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult
from tests.strategies import JSON

NAMES = ("sdxl",)
PLAIN = ImageRequest(prompt="p", guidance_scale=7.0)


def decode(
    engine: str = "sdxl", accept: str | None = "application/json", drop: str = "", **fields: Any
) -> stability.Decoded:
    body = {"text_prompts": [{"text": "p"}]} | fields
    body.pop(drop, None)
    return stability.decode(json.dumps(body).encode(), engine, accept, NAMES)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(**fields)
    assert "\n" not in caught.value.message
    return caught.value


JOINED = "text_prompts: 2 texts of negative weight were joined by commas"
SIGN_ALONE = "text_prompts: a weight acts by its sign alone, as 1 or -1"


def texts(*weighted: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [{"text": text, "weight": weight} for text, weight in weighted]


def test_a_prompt_is_enough_and_the_defaults_are_the_formats_but_for_the_size() -> None:
    assert decode() == stability.Decoded(PLAIN, "application/json", ())
    assert PLAIN.num_inference_steps == 50


def test_its_names_are_ours() -> None:
    asked = decode(cfg_scale=3, steps=20, samples=2, seed=5, sampler="K_EULER_ANCESTRAL", width=64, height=128)
    assert asked.warnings == ()
    assert asked.request == ImageRequest(
        prompt="p", guidance_scale=3.0, num_inference_steps=20, n=2, seed=5, scheduler="euler_ancestral", width=64,
        height=128,
    )  # fmt: skip


def test_null_means_absent() -> None:
    nulls = dict.fromkeys(stability.TextToImageFields.model_fields)
    del nulls["text_prompts"]
    assert decode(**nulls) == decode()


@pytest.mark.parametrize("engine", ["sdxl", "stable-diffusion-xl-1024-v1-0"])
def test_the_engine_is_one_of_ours(engine: str) -> None:
    assert decode(engine).request == PLAIN


def test_another_engine_is_404() -> None:
    error = refusal(engine="stable-diffusion-v1-6")
    assert isinstance(error, ModelNotFound) and error.message == (
        "engine: 'stable-diffusion-v1-6' was not found; this service has sdxl, stable-diffusion-xl-1024-v1-0"
    )


def test_seed_zero_is_drawn() -> None:
    assert decode(seed=0).request.seed is None
    assert decode(seed=1).request.seed == 1


@pytest.mark.parametrize(
    ("prompts", "negative", "warnings"),
    [
        ([("p", 1), ("n", -1)], "n", ()),
        ([("n", -1), ("p", None)], "n", ()),
        (
            [("p", 1), ("n", -1.0), ("m", -1)],
            "n, m",
            ("text_prompts: 2 texts of negative weight were joined by commas",),
        ),
        ([("p", 0.5)], None, ("text_prompts: a weight acts by its sign alone, as 1 or -1",)),
        ([("p", 1), ("n", -0.5)], "n", ("text_prompts: a weight acts by its sign alone, as 1 or -1",)),
        ([("p", 1), ("z", 0)], None, ("text_prompts of weight 0 have no effect",)),
        ([("p", 1), ("", -1)], "", ()),
    ],
)
def test_weights_part_the_prompts(prompts: list[tuple[str, float]], negative: str | None, warnings: Any) -> None:
    asked = decode(text_prompts=texts(*prompts))
    assert asked.request == PLAIN.model_copy(update={"negative_prompt": negative})
    assert asked.warnings == warnings


@pytest.mark.parametrize("prompts", [[("p", 1), ("q", 1)], [("n", -1)], [("z", 0)]])
def test_there_is_exactly_one_positive_prompt(prompts: list[tuple[str, float]]) -> None:
    error = refusal(text_prompts=texts(*prompts))
    assert error.param == "text_prompts" and error.message.endswith("SDXL takes exactly one")


@pytest.mark.parametrize(
    ("sampler", "ours"), [*((s, row.name) for s, row in BY_STABILITY.items()), ("unipc", "unipc"), (None, None)]
)
def test_samplers(sampler: str | None, ours: str | None) -> None:
    assert decode(sampler=sampler).request.scheduler == ours


@pytest.mark.parametrize("sampler", ["DDPM", "K_DPM_2", "K_DPM_2_ANCESTRAL", "K_DPMPP_2S_ANCESTRAL", ""])
def test_a_sampler_that_is_not_there_is_refused_and_ours_are_listed(sampler: str) -> None:
    assert refusal(sampler=sampler).message == (
        f"sampler: {sampler!r} is unknown; this service has DDIM, K_DPMPP_2M, K_EULER, K_EULER_ANCESTRAL, "
        "K_HEUN, K_LMS, dpmpp_2m_karras, dpmpp_2m_sde, unipc"
    )


def test_sdxls_own_fields_ride_in_extras() -> None:
    asked = decode(extras={"high_noise_frac": 0.5, "original_size": [64, 32], "prompt_2": None, "x": 1, "n": 2})
    assert asked.request == PLAIN.model_copy(update={"high_noise_frac": 0.5, "original_size": (64, 32)})
    assert asked.warnings == ("extras.x is unknown and was ignored", "extras.n is unknown and was ignored")
    assert refusal(extras={"high_noise_frac": 2}).message.startswith("extras.high_noise_frac: ")


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"style_preset": "anime"}, "style_preset has no effect on SDXL"),
        ({"clip_guidance_preset": "FAST_BLUE"}, "clip_guidance_preset has no effect on SDXL"),
        ({"prompt": "q"}, "prompt is unknown and was ignored"),
    ],
)
def test_what_has_no_effect_is_said(fields: dict[str, Any], warning: str) -> None:
    assert decode(**fields) == stability.Decoded(PLAIN, "application/json", (warning,))
    assert decode(clip_guidance_preset="NONE").warnings == ()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("text_prompts", []),
        ("text_prompts", "p"),
        ("text_prompts", [{"text": " "}]),
        ("text_prompts", [{"weight": 1}]),
        ("text_prompts", [{"text": "p", "weight": "1"}]),
        ("text_prompts", [{"text": "p"}] * 11),
        ("text_prompts", [{"text": "p"}, {"text": "x" * 4001, "weight": -1}]),
        ("cfg_scale", 36),
        ("cfg_scale", -1),
        ("steps", 9),
        ("steps", 151),
        ("samples", 0),
        ("samples", 11),
        ("seed", -1),
        ("seed", 2**32),
        ("width", 65),
        ("style_preset", "bold"),
        ("clip_guidance_preset", "FAST"),
        ("extras", []),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(name: str, wrong: Any) -> None:
    error = refusal(**{name: wrong})
    assert error.param == name
    assert error.message.startswith(name)


def test_an_unknown_field_of_a_prompt_warns() -> None:
    asked = decode(text_prompts=[{"text": "p"}, {"text": "n", "weight": -1, "x": 1}])
    assert (asked.request.negative_prompt, asked.warnings) == ("n", ("text_prompts.1.x is unknown and was ignored",))


def test_a_body_without_prompts_is_refused() -> None:
    assert refusal(drop="text_prompts").message == "text_prompts: field required"


def test_accept_decides_the_answer() -> None:
    assert decode(accept=None).media_type == decode(accept="*/*").media_type == "application/json"
    assert decode(accept="image/png").media_type == "image/png"
    assert decode(accept="image/*").media_type == "image/png"
    assert refusal(accept="image/png", samples=2).param == "samples"
    with pytest.raises(NotAcceptable):
        decode(accept="image/jpeg")


RESULT = ImageResult(
    [GeneratedImage(b"one", 5, "png", 64, 64), GeneratedImage(b"two", 6, "png", 64, 64)], warnings=["cut"]
)


def test_the_response_has_artifacts() -> None:
    assert stability.encode(RESULT, ("asked",)) == {
        "artifacts": [
            {"base64": "b25l", "seed": 5, "finishReason": "SUCCESS"},
            {"base64": "dHdv", "seed": 6, "finishReason": "SUCCESS"},
        ],
        "warnings": ["asked", "cut"],
    }


def test_a_picture_alone_has_its_seed_in_a_header() -> None:
    assert stability.encode_picture(RESULT) == stability.Answer(b"one", (("finish-reason", "SUCCESS"), ("seed", "5")))


def test_an_error_has_stabilitys_keys_and_words() -> None:
    error = InvalidRequest("num_inference_steps: 120 is above", param="num_inference_steps")
    assert stability.encode_error(error, "id-1") == {
        "id": "id-1", "name": "bad_request", "message": "steps: 120 is above"
    }  # fmt: skip
    no_refiner = InvalidRequest("high_noise_frac: no", param="high_noise_frac")
    assert stability.encode_error(no_refiner)["message"] == "extras.high_noise_frac: no"
    assert stability.encode_error(Overloaded("full"))["name"] == "service_unavailable"
    assert stability.encode_error(NotAcceptable("no"))["name"] == "not_acceptable"
    assert stability.encode_error(ServiceError("no"))["name"] == "server_error"


def test_the_engines_are_listed() -> None:
    assert [engine["id"] for engine in stability.encode_engines(NAMES)] == ["sdxl", "stable-diffusion-xl-1024-v1-0"]


def test_the_schemas_example_is_accepted() -> None:
    schema = stability.text_to_image_schema()
    assert set(schema["properties"]) == set(stability.TextToImageFields.model_fields)
    assert "$ref" not in json.dumps(schema)
    assert decode(**schema["example"]).warnings == ()


EXTRAS = st.dictionaries(st.sampled_from(stability.EXTRAS), JSON, max_size=3)
KEYS = st.sampled_from([*stability.TextToImageFields.model_fields, "\ud800"])
PROMPTS = st.lists(
    st.fixed_dictionaries({"text": st.text(max_size=4)}, optional={"weight": st.sampled_from([1, -1, 0, 0.5, None])})
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(KEYS, JSON, max_size=4),
    PROMPTS,
    st.dictionaries(st.sampled_from(stability.EXTRAS), JSON, max_size=3),
)
def test_no_body_raises_anything_but_an_error_with_one_line(fields: Any, prompts: Any, extras: Any) -> None:
    for body in (fields, fields | {"text_prompts": prompts}, {"text_prompts": [{"text": "p"}], "extras": extras}):
        try:
            stability.decode(json.dumps(body).encode(), "sdxl", None, NAMES)
        except ServiceError as error:
            assert "\n" not in error.message
            json.dumps(stability.encode_error(error), ensure_ascii=False).encode()
